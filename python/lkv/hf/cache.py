"""`lkv.Cache`: a transformers cache that evicts, for `generate` and for the model's own `forward`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lkv import policies
from lkv.hf.compat import find_decoder
from lkv.hf.copies import Copies
from lkv.hf.layer import RaggedLayer
from lkv.hf.settings import Settings
from lkv.hf.versions import (
    is_recurrent,
    own_layers,
    stage_of_generate,
    tokens_to_drop,
)
from lkv.policies.base import check_layers


class Cache(Copies):
    """A transformers cache in which every KV head of every full-attention layer keeps only the rows a policy chose.

        cache = lkv.Cache(model, "snapkv", retention=0.15)
        model.generate(**inputs, past_key_values=cache)

    The model's own attention reads a prompt in full, layer by layer. Each layer is evicted before the next one runs;
    with a policy of scope "model" all layers are evicted after the last. New tokens are then appended in place and
    attend to the rows that are left, at their logical positions. A later prompt is appended, attends, and is evicted
    together with the old rows. Batches may be padded anywhere. Sliding-window and other layers are transformers' own.

    These tokens count as a prompt: a call of several tokens; everything `generate` feeds before its first new token;
    everything within `prefill`, and from then on nothing else. Outside of both, single tokens count as a prompt, too,
    if all tokens so far came one by one.

    The cache follows the mask. Tokens that `attention_mask` `[B, L]` hides are evicted, at once or when a later call
    hides them, and do not come back. Other masks, such as those of candidate trees `[B, H, n, L]`, are followed until
    the first eviction and refused after it.

    The model's attention is replaced only during a forward with this cache. Other caches, other models with the same
    config and other threads get the model's own attention even then.

    Args:
        model: a transformers model, also in a wrapper of PEFT or torch.compile. Its attention modules show which layers
            can be evicted; if there are none, the error gives the reason.
        policy: a name ("snapkv", "adakv", "streaming_llm") or a policy object.
        retention: fraction of the logical length (tokens without padding) to keep, in (0, 1]; or
        budget: rows to keep; both per head, on average over a layer's heads.
        chunks: when to evict a prompt that comes in several calls. "each": after every call, so that memory is bounded.
            "last": after the first token that follows the prompt, or at the end of `prefill`, so that all of the prompt
            is attended to in full.
        cap: most rows per head while decoding, on average over a layer. Then `interval` rows are evicted, or as many as
            come at once. Default: no cap; generated tokens are kept.
        interval: default: an eighth of the cap.
        reserve: rows of slack after the rows of every head; new tokens are written there in place.
        observe: what to store for `evict` with other policies, in addition to what this one needs: "queries",
            "pre_rope_keys" (the rotations of all tokens, once for all layers) or "hidden_states" (of all tokens in
            every layer, evicted ones included: more memory than the keys and values of grouped heads), "all_queries"
            (of prompts since the last eviction), "attention_cosine" or "output_projection" (next to nothing).
        observe_window: how many of the last queries to store. Default: the policy's window.

    A call that fails leaves the cache as it was. If it had already evicted rows of earlier turns in some layers, these
    rows are lost, and every later call raises until `reset`.

    Raises:
        ValueError, TypeError: for arguments out of range, and a model that cannot be evicted, with the reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | policies.Policy = "snapkv",
        *,
        retention: float | None = None,
        budget: int | None = None,
        chunks: str = "each",
        cap: int | None = None,
        interval: int | None = None,
        reserve: int = 64,
        observe: Iterable[str] = (),
        observe_window: int | None = None,
    ) -> None:
        if interval is None:
            interval = max(1, (cap or 0) // 8)
        policy = policies.get(policy)
        if "second_pass" in policy.needs:
            raise ValueError(
                f"lkv.Cache: expected a policy that scores while a text is read, got {policy}, which needs a "
                "second pass over its text: lkv.compress(model, ids, policy, retention=...) makes a cache of both"
            )
        observe = frozenset(observe) | policy.needs
        window = max(policy.window, 1) if observe_window is None else observe_window
        settings = Settings(policy, retention, budget, chunks, cap, interval, reserve, observe, window)
        settings.check_needs()
        decoder = find_decoder(model)
        self._prepare(decoder, settings)
        check_layers(policy, len(decoder.readers))
        self._make(decoder.config, settings, type(model).__name__, decoder.readers)

    def close(self) -> None:
        """Does nothing, and need not be called: between calls the model is as if there were no cache of ours."""

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def prefill(self) -> AbstractContextManager[None]:
        """Marks the prompt: all tokens of calls inside the block, in pieces of any size, and no tokens outside of it.

        The prompt is evicted at the end of the block, so that every question starts from the same cache:

            with cache.prefill():
                model(document, past_key_values=cache)
            end = cache.get_seq_length()
            for question in questions:
                model.generate(torch.cat([document, question], 1), past_key_values=cache)
                cache.crop(end)
        """
        return self._prefill()

    def evict(
        self,
        policy: str | policies.Policy | None = None,
        *,
        retention: float | None = None,
        budget: int | None = None,
        scores: Sequence[Tensor] | None = None,
    ) -> None:
        """Evicts all layers now. Later tokens are evicted by the cache's own settings.

        Args:
            policy: default: the cache's own. What it needs must have been observed: see `observe`.
            retention, budget: as in `lkv.Cache`, of all tokens so far; default: the cache's own.
            scores: `[B, H, L]` for each layer of `ragged`, made elsewhere, for example in a second pass, in place
                of the policy's; the policy only makes the budgets and needs no observations. L is the length of whole
                rows, padding included, or that of the fullest head (`RaggedCache.padded`).

        Raises:
            ValueError, TypeError: for arguments out of range, an empty cache, and scores or budgets of a wrong shape;
                nothing is evicted then.
        """
        settings = self.settings
        if policy is not None:
            settings = replace(settings, policy=policies.get(policy))
        if retention is not None or budget is not None:
            settings = replace(settings, retention=retention, budget=budget)
        if scores is None:
            settings.check_needs()
        elif len(scores) != len(self.ragged):
            raise ValueError(
                f"lkv.Cache.evict: expected scores of {len(self.ragged)} layers, got those of {len(scores)}"
            )
        self.settle()
        if any(not layer.token_counts for layer in self.ragged):
            raise ValueError("lkv.Cache.evict: expected a cache with tokens, got an empty one")
        self._evict(self.ragged, settings, scores=scores)

    # What transformers calls.

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)
        super().reorder_cache(beam_idx)

    def _select(self, indices: Tensor) -> None:
        """What the layers share goes on with the sequences `indices`, before they do.

        Raises:
            ValueError: for indices of sequences that are not there; nothing has changed then.
        """
        self.settle()
        order, batch = indices.tolist(), len(self.ragged[0].token_counts)
        if batch and not all(type(b) is int and 0 <= b < batch for b in order):
            raise ValueError(f"lkv.Cache: expected indices of sequences in [0, {batch}), got {order}")
        self.history.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = max((len(layer.token_counts) for layer in self.ragged), default=0)
        self.batch_select_indices(torch.arange(batch, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)
        for layer in self.layers:
            # A recurrent state knows this by another name alone.
            select: Any = getattr(layer, "reorder_cache" if is_recurrent(layer) else "batch_select_indices")
            select(indices)

    def crop(self, tokens: int) -> None:
        """Drops tokens at the end: `-n` drops n, a positive number is the length to keep.

        Raises:
            ValueError: past the last eviction, as those rows are gone, and if other layers cannot go back: beyond the
                window of sliding layers, and with a recurrent state. Nothing is dropped then.
        """
        self.settle()
        drop = tokens_to_drop(tokens, self._length)
        for layer in self.ragged:
            layer.check_crop(tokens)
        if drop and any(_cannot_crop(layer) for layer in self.layers):
            raise ValueError(
                "lkv.Cache.crop: expected layers that can go back, got sliding windows that have moved on, or a "
                "recurrent state: fork() the cache before"
            )
        self.history.crop(drop, self._length)
        super().crop(-drop)  # what layers of every transformers take
        if stage_of_generate() == "first draft":  # verified: what is left of the call is there to stay
            self.evict_due()

    def reset(self) -> None:
        """Forgets all tokens; settings and model stay."""
        self.settle()
        self._forget()
        for i, layer in enumerate(own_layers(self._config)):
            # Their own reset writes zeros, also into what a fork shares.
            if isinstance(self.layers[i], RaggedLayer):
                self.layers[i].reset()
            else:
                self.layers[i] = layer

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, object]]:
        """Keys and values of every layer as transformers' `DynamicCache` gives them, and its window, if any.

        Packed rows come as `[B, H, C, D]`, as from `RaggedCache.padded`: the rows of a head, then any content.
        """
        for layer in self.layers:
            if isinstance(layer, RaggedLayer) and layer.rows is not None:
                yield layer.rows.padded(layer.rows.k), layer.rows.padded(layer.rows.v), None
            else:
                window = getattr(layer, "_sliding_window_tensor", None)
                yield getattr(layer, "keys", None), getattr(layer, "values", None), window

    @property
    def nbytes(self) -> int:
        """Bytes of K and V in all layers, slack, transformers' own layers and sums that a policy carries included."""
        return sum(
            layer.rows.nbytes
            if isinstance(layer, RaggedLayer) and layer.rows is not None
            else sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
            for layer in self.layers
        )

    @property
    def retained_bytes(self) -> int:
        """Bytes of the rows in use in the layers that are evicted, sums of a policy included; synchronises on CUDA."""
        return sum(
            layer.rows.retained_bytes
            if layer.rows is not None
            else sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
            for layer in self.ragged
        )


def _cannot_crop(layer: Any) -> bool:
    """Whether transformers' own layer, of any version, holds less than there was."""
    if is_recurrent(layer):
        return not (getattr(layer, "record_past", False) and layer.is_croppable)
    window = getattr(layer, "sliding_window", None)
    return window is not None and not getattr(layer, "record_past", False) and layer.get_seq_length() >= window
