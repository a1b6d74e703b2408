"""`lkv.Cache`: a transformers cache that evicts, for `generate` and for the model's own `forward`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lkv import policies
from lkv.hf.capture import HOOKED, ROTATED
from lkv.hf.eviction import evict
from lkv.hf.layer import RaggedLayer
from lkv.hf.routing import route
from lkv.hf.session import Session
from lkv.hf.settings import Settings
from lkv.hf.versions import HFCache, is_appended_by_copy, is_full_attention, own_layers


class Cache(HFCache):
    """A cache of which every head of every full-attention layer keeps the rows that a policy chose, and no others.

        cache = lkv.Cache(model, "snapkv", retention=0.15)
        model.generate(**inputs, past_key_values=cache)

    A prompt is attended to in full by the model's own attention, layer by layer; each layer is evicted before the next
    one is reached, or, by a policy of scope "model", all of them behind the last. Then new tokens are appended in place
    and attend to what is left, at their logical positions. A later prompt is appended, attends, and is evicted again
    out of old and new rows. Batches may be padded: a first prompt on the left, what follows anywhere. Sliding-window
    and other layers are transformers' own.

    While a cache of it is alive, the model runs under our attention's name, which is its own attention for all other
    caches; `close`, leaving `with`, or the end of the last cache restores it.

    Args:
        model: a transformers model whose attention goes through its `AttentionInterface`.
        policy: a name ("snapkv", "adakv", "streaming_llm") or a policy object.
        retention: fraction of the logical length (tokens without padding) to keep, in (0, 1]; or
        budget: rows to keep; both per head, on average over a layer's heads.
        chunks: with a prompt in several calls, "each" evicts after every one, so that memory is bounded; "last" at the
            first single token that follows, so that all of the prompt's chunks were attended to in full.
        cap: rows per head, on average over a layer, beyond which decoding does not go: when they are reached,
            `interval` rows are evicted, however long it goes on. Without a cap generated tokens are kept.
        interval: default: an eighth of the cap.
        reserve: rows of slack behind every head, into which tokens are written in place.
        observe: what to hold for `evict` with other policies, beside what this one needs: "queries", "pre_rope_keys"
            (the rotations of all tokens are held, once for all layers) and "hidden_states" (held of all tokens in every
            layer, those that were evicted too: more memory than keys and values of grouped heads).
        observe_window: how many of the last queries. Default: the policy's window.

    A call that fails leaves the cache as it was. Where it had already evicted rows of earlier turns in some layers,
    these are lost: every later call says so until `reset`.

    Raises:
        ValueError, TypeError: for arguments out of range, and a model whose attention cannot be routed.
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
        observe = frozenset(observe) | policy.needs
        window = max(policy.window, 1) if observe_window is None else observe_window
        settings = Settings(policy, retention, budget, chunks, cap, interval, reserve, observe, window)
        settings.check_needs()
        self._config, self._route = config, _ = route(model)
        if "pre_rope_keys" in observe and config.model_type not in ROTATED:
            raise ValueError(
                f"lkv.Cache: expected one of {', '.join(sorted(ROTATED))} where keys before RoPE are needed, got "
                f"{config.model_type}"
            )
        self._session = Session(settings, type(model).__name__)
        layers = [
            RaggedLayer(self._session, i) if is_full_attention(layer) else layer
            for i, layer in enumerate(own_layers(config))
        ]
        if not any(isinstance(layer, RaggedLayer) for layer in layers):
            raise ValueError("lkv.Cache: expected a model with full-attention layers, got none")
        super().__init__(layers=layers)
        self._begin()

    def _begin(self) -> None:
        self._session.attach(self.layers)
        observes = bool(self.settings.observe & HOOKED)
        self._route.acquire(observes)
        self._close = weakref.finalize(self, self._route.release, observes)

    def close(self) -> None:
        """Gives the model its own attention back, unless another cache still needs ours. The rows stay."""
        self._session.closed = True
        self._close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, object]) -> Cache:
        """A cache that goes on from here by itself, on the same model."""
        return self._copy(memo)

    def fork(self) -> Cache:
        """A copy that shares the whole rows of a prompt that is not evicted yet: these are never written to.

        Packed rows and the last queries are copied. Many policies can so be tried on one prompt:

            cache = lkv.Cache(model, retention=1.0, chunks="last", observe={"queries"})
            model(prompt, past_key_values=cache)
            for policy in policies:
                fork = cache.fork()
                fork.evict(policy, retention=0.1)
                model.generate(torch.cat([prompt, question], 1), past_key_values=fork)
        """
        memo: dict[int, object] = {}
        for layer in self.layers:
            if isinstance(layer, RaggedLayer) or is_appended_by_copy(layer):
                memo |= {id(t): t for t in (layer.keys, layer.values) if t is not None}
        return self._copy(memo)

    def _copy(self, memo: dict[int, object]) -> Cache:
        self._session.settle()
        other = object.__new__(type(self))
        memo |= {id(self): other, id(self.settings): self.settings}  # a policy may be large, and holds no request
        for name, value in vars(self).items():
            setattr(other, name, value if name in ("_config", "_route", "_close") else copy.deepcopy(value, memo))
        other._begin()
        return other

    def evict(
        self,
        policy: str | policies.Policy | None = None,
        *,
        retention: float | None = None,
        budget: int | None = None,
        scores: Sequence[Tensor] | None = None,
    ) -> None:
        """Evicts all layers now. What comes later is evicted as the cache's own settings say.

        Args:
            policy: default: the cache's own. What it needs must have been observed: see `observe`.
            retention, budget: as in `lkv.Cache`, of all tokens so far; default: the cache's own.
            scores: `[B, H, L]` for each layer of `ragged`, made elsewhere, as in a second pass, in the place of what
                the policy would say; it says the budgets alone, and needs nothing. L is that of whole rows, padding
                included, or that of the fullest head (`RaggedCache.padded`).

        Raises:
            ValueError, TypeError: for arguments out of range, an empty cache, and whatever the policy answers that does
                not fit; the cache is as it was then.
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
        self._session.settle()
        if any(not layer.real for layer in self.ragged):
            raise ValueError("lkv.Cache.evict: expected a cache with tokens, got an empty one")
        evict(self.ragged, settings, scores=scores)

    # What transformers calls. Between the layers of a call, the tokens of that call are not there yet.

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values `[B, H, n, D]` of one layer; returned is what its attention shall be given."""
        with self._session.all_or_nothing():
            self._session.enter(layer_idx, key_states.shape[2])
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if not isinstance(self.layers[layer_idx], RaggedLayer):
                self._session.leave(layer_idx)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical: evicted tokens count."""
        before = self._session.length_before(layer_idx)
        return super().get_seq_length(layer_idx) if before is None else before

    def get_mask_sizes(self, *args: object, **kwargs: object) -> tuple[int, int]:
        """As transformers': length and offset of the keys that a call to come is to mask."""
        self._session.settle()
        return super().get_mask_sizes(*args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._session.select(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = max((len(layer.real) for layer in self.ragged), default=0)
        self._session.select(torch.arange(batch).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._session.select(indices)
        super().batch_select_indices(indices)

    def crop(self, tokens: int) -> None:
        """Drops tokens at the end: `-n` drops n, a positive number is the length to keep.

        Raises:
            ValueError: past the last eviction, whose rows are gone; nothing is dropped then.
        """
        self._session.settle()
        for layer in self.ragged:
            layer.check_crop(tokens)
        super().crop(tokens)

    def reset(self) -> None:
        """Forgets all tokens; settings and model stay."""
        self._session.reset()
        for i, layer in enumerate(own_layers(self._config)):
            # Their own reset writes zeros, also into what a fork shares.
            if isinstance(self.layers[i], RaggedLayer):
                self.layers[i].reset()
            else:
                self.layers[i] = layer
        self._session.attach(self.layers)

    @property
    def settings(self) -> Settings:
        return self._session.settings

    @property
    def ragged(self) -> list[RaggedLayer]:
        """The layers that are evicted."""
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    @property
    def nbytes(self) -> int:
        """Of K and V in all layers, slack and transformers' own layers included."""
        return sum(
            layer.rows.nbytes
            if isinstance(layer, RaggedLayer) and layer.rows is not None
            else sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
            for layer in self.layers
        )

    @property
    def retained_bytes(self) -> int:
        """Of the rows in use in the layers that are evicted; synchronises on CUDA."""
        return sum(
            layer.rows.retained_bytes
            if layer.rows is not None
            else sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
            for layer in self.ragged
        )
