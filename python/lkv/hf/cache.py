"""`lkv.Cache`: a transformers cache that evicts, for `generate` and for the model's own `forward`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lkv import policies
from lkv.hf import state
from lkv.hf.capture import HOOKED, ROTATED, install_capture
from lkv.hf.compat import Decoder, find_decoder
from lkv.hf.layer import RaggedLayer
from lkv.hf.planning import evict
from lkv.hf.routing import check_attention, install
from lkv.hf.session import Session
from lkv.hf.settings import Settings
from lkv.hf.versions import (
    HFCache,
    is_appended_by_copy,
    is_recurrent,
    outside_graphs,
    own_layers,
    stage_of_generate,
    tokens_to_drop,
)
from lkv_ext.shared import keeps_tensors


class Cache(HFCache):
    """A cache of which every head of every full-attention layer keeps the rows that a policy chose, and no others.

        cache = lkv.Cache(model, "snapkv", retention=0.15)
        model.generate(**inputs, past_key_values=cache)

    A prompt is attended to in full by the model's own attention, layer by layer; each layer is evicted before the next
    one is reached, or, by a policy of scope "model", all of them behind the last. Then new tokens are appended in place
    and attend to what is left, at their logical positions. A later prompt is appended, attends, and is evicted again
    out of old and new rows. Batches may be padded anywhere. Sliding-window and other layers are transformers' own.

    What is a prompt: a call of several tokens; whatever `generate` does before its first new token; what comes within
    `prefill`, and then nothing else. Single tokens from the very first on, outside of both, are taken for one, too.

    The mask is followed. Tokens that `attention_mask` `[B, L]` hides leave the rows, at once or when a later call hides
    them, and stay away. Other masks, as those of trees of candidates `[B, H, n, L]`, are followed while the rows are
    whole, which is before the first eviction, and refused from then on.

    The model's attention is replaced for the length of a forward with a cache of ours; for other caches, models of the
    same config and threads it is the model's own, then as well.

    Args:
        model: a transformers model, in a wrapper of PEFT or torch.compile or without. Which layers can be evicted is
            found by looking at its attention modules; where there are none, the error says why.
        policy: a name ("snapkv", "adakv", "streaming_llm") or a policy object.
        retention: fraction of the logical length (tokens without padding) to keep, in (0, 1]; or
        budget: rows to keep; both per head, on average over a layer's heads.
        chunks: with a prompt in several calls, "each" evicts behind every one, so that memory is bounded; "last" behind
            the first token that follows it, or at the end of `prefill`: all of the prompt was attended to in full.
        cap: rows per head, on average over a layer, beyond which decoding does not go: when they are reached,
            `interval` rows are evicted, or as many as come at once, however long it goes on. Without a cap generated
            tokens are kept.
        interval: default: an eighth of the cap.
        reserve: rows of slack behind every head, into which tokens are written in place.
        observe: what to hold for `evict` with other policies, beside what this one needs: "queries", "pre_rope_keys"
            (the rotations of all tokens are held, once for all layers) and "hidden_states" (held of all tokens in every
            layer, those that were evicted too: more memory than keys and values of grouped heads).
        observe_window: how many of the last queries. Default: the policy's window.

    A call that fails leaves the cache as it was. Where it had already evicted rows of earlier turns in some layers,
    these are lost: every later call says so until `reset`.

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
        observe = frozenset(observe) | policy.needs
        window = max(policy.window, 1) if observe_window is None else observe_window
        settings = Settings(policy, retention, budget, chunks, cap, interval, reserve, observe, window)
        settings.check_needs()
        decoder = find_decoder(model)
        self._prepare(decoder, settings)
        self._make(decoder.config, Session(settings, type(model).__name__, decoder.readers))

    def _make(self, config: PretrainedConfig, session: Session) -> None:
        """All layers, empty."""
        self._config, self.lkv_session = config, session
        layers = [
            RaggedLayer(session, i) if i in session.readers else layer for i, layer in enumerate(own_layers(config))
        ]
        super().__init__(layers=layers)
        session.attach(self.layers)

    @staticmethod
    def _prepare(decoder: Decoder, settings: Settings) -> None:
        """Everything that a forward with a cache of ours needs, checked first."""
        kind = decoder.config.model_type
        if "pre_rope_keys" in settings.observe and kind not in ROTATED:
            raise ValueError(
                f"lkv.Cache: expected one of {', '.join(sorted(ROTATED))} where keys before RoPE are needed, got {kind}"
            )
        check_attention(decoder.module)
        install(decoder)
        if settings.observe & HOOKED:
            install_capture(decoder.module)

    def attach(self, model: PreTrainedModel) -> None:
        """Prepares another model of the same kind: a copy, or the one here for a cache that was pickled elsewhere.

        Raises:
            ValueError, TypeError: for a model whose cache would have other layers.
        """
        decoder = find_decoder(model)
        mine, its = ([type(layer) for layer in own_layers(config)] for config in (self._config, decoder.config))
        if decoder.readers != self.lkv_session.readers or mine != its:
            raise ValueError(
                f"lkv.Cache.attach: expected a model with {len(mine)} cache layers like those of "
                f"{self.lkv_session.model}, got {type(model).__name__} with {len(its)}"
            )
        self._prepare(decoder, self.settings)

    def close(self) -> None:
        """Does nothing, and need not be called: between calls the model is as if there were no cache of ours."""

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def prefill(self) -> AbstractContextManager[None]:
        """Says what is the prompt: all tokens of calls within, in pieces of whatever size, and none of those without.

        What is due is evicted at the end, so that the next question finds the cache as the prompt left it:

            with cache.prefill():
                model(document, past_key_values=cache)
            end = cache.get_seq_length()
            for question in questions:
                model.generate(torch.cat([document, question], 1), past_key_values=cache)
                cache.crop(end)
        """
        return self.lkv_session.prefill()

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the cache as one safetensors file, for `load`; the model and weights of a policy are not in it."""
        self.lkv_session.settle()
        state.save(self, path)

    @classmethod
    @keeps_tensors
    def load(
        cls,
        path: str | PathLike[str],
        model: PreTrainedModel,
        *,
        policy: str | policies.Policy | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        """A cache that goes on where the one that `save` wrote was.

        Args:
            model: of the same kind. What its weights are is not checked.
            policy: for what comes. Default: the one that was used, if it is of `lkv.policies` and holds no weights.
            device: default: the model's.

        Raises:
            ValueError: for a file that is truncated, of another kind or not consistent, and a model of another shape.
        """
        decoder = find_decoder(model)
        settings, stored = state.load(path, decoder.config, policy)
        cls._prepare(decoder, settings)
        session = Session(settings, type(model).__name__, decoder.readers)
        return _revived(cls, decoder.config, session, stored, device or decoder.module.device)

    def __reduce__(self) -> tuple[object, ...]:
        """What is pickled, in the form of `save`. A process that has made no cache for the model yet needs `attach`."""
        self.lkv_session.settle()
        session = self.lkv_session
        facts = session.settings, session.model, session.readers
        return _unpickled, (type(self), self._config, facts, state.state_of(self))

    def __deepcopy__(self, memo: dict[int, object]) -> Cache:
        """A cache that goes on from here by itself, on the same model."""
        return self._copy(memo)

    def __copy__(self) -> Cache:
        return self.fork()

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
        self.lkv_session.settle()
        other = object.__new__(type(self))
        memo |= {id(self): other, id(self.settings): self.settings}  # a policy may be large, and holds no request
        for name, value in vars(self).items():
            setattr(other, name, value if name == "_config" else copy.deepcopy(value, memo))
        other.lkv_session.attach(other.layers)
        other.lkv_session.in_prefill = False  # nobody will end it there
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
        self.lkv_session.settle()
        if any(not layer.token_counts for layer in self.ragged):
            raise ValueError("lkv.Cache.evict: expected a cache with tokens, got an empty one")
        evict(self.ragged, settings, scores=scores)

    # What transformers calls. Between the layers of a call, the tokens of that call are not there yet.

    @outside_graphs
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values `[B, H, n, D]` of one layer; returned is what its attention shall be given."""
        self.lkv_session.enter(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> Tensor:
        """As transformers': of layers with a recurrent state, which are its own."""
        self.lkv_session.enter(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def update_recurrent_state(self, states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> Tensor:
        """As transformers': of layers with a recurrent state, which are its own."""
        self.lkv_session.enter(layer_idx)
        return super().update_recurrent_state(states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical: evicted tokens count."""
        before = self.lkv_session.length_before(layer_idx)
        return super().get_seq_length(layer_idx) if before is None else before

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.lkv_session.select(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = max((len(layer.token_counts) for layer in self.ragged), default=0)
        self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.lkv_session.select(indices)
        for layer in self.layers:
            # A recurrent state knows this by another name alone.
            (layer.reorder_cache if is_recurrent(layer) else layer.batch_select_indices)(indices)

    def crop(self, tokens: int) -> None:
        """Drops tokens at the end: `-n` drops n, a positive number is the length to keep.

        Raises:
            ValueError: past the last eviction, whose rows are gone, and where other layers cannot go back: beyond the
                window of sliding layers, and with a recurrent state. Nothing is dropped then.
        """
        session = self.lkv_session
        session.settle()
        drop = tokens_to_drop(tokens, session.length)
        for layer in self.ragged:
            layer.check_crop(tokens)
        if drop and any(_cannot_crop(layer) for layer in self.layers):
            raise ValueError(
                "lkv.Cache.crop: expected layers that can go back, got sliding windows that have moved on, or a "
                "recurrent state: fork() the cache before"
            )
        session.crop(drop)
        super().crop(tokens)
        if stage_of_generate() == "draft":  # verified: what is left of the call is there to stay
            session.evict_due()

    def reset(self) -> None:
        """Forgets all tokens; settings and model stay."""
        self.lkv_session.settle()
        self.lkv_session.reset()
        for i, layer in enumerate(own_layers(self._config)):
            # Their own reset writes zeros, also into what a fork shares.
            if isinstance(self.layers[i], RaggedLayer):
                self.layers[i].reset()
            else:
                self.layers[i] = layer
        self.lkv_session.attach(self.layers)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, object]]:
        """Keys and values of every layer as transformers' `DynamicCache` gives them, and its window, if any.

        Of packed rows `[B, H, C, D]`, as `RaggedCache.padded`: behind the rows of a head any content.
        """
        for layer in self.layers:
            if isinstance(layer, RaggedLayer) and layer.rows is not None:
                yield layer.rows.padded(layer.rows.k), layer.rows.padded(layer.rows.v), None
            else:
                window = getattr(layer, "_sliding_window_tensor", None)
                yield getattr(layer, "keys", None), getattr(layer, "values", None), window

    @property
    def settings(self) -> Settings:
        return self.lkv_session.settings

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


def _cannot_crop(layer: object) -> bool:
    """Whether transformers' own layer holds less than there was."""
    if is_recurrent(layer):
        return not (getattr(layer, "record_past", False) and layer.is_croppable)
    window = getattr(layer, "sliding_window", None)
    return window is not None and not getattr(layer, "record_past", False) and layer.get_seq_length() >= window


def _unpickled(cls: type[Cache], config: PretrainedConfig, facts: tuple[object, ...], stored: state.State) -> Cache:
    return _revived(cls, config, Session(*facts), stored, None)


@keeps_tensors
def _revived(
    cls: type[Cache], config: PretrainedConfig, session: Session, stored: state.State, device: torch.device | str | None
) -> Cache:
    cache = object.__new__(cls)
    cache._make(config, session)
    state.restore(cache, stored, device)
    return cache
