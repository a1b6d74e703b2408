"""What is kept of a layer beside its rows, and what a policy sees of both."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lkv.hf.capture import HOOKED, Captured, rotary_embedding
from lkv.hf.masks import PaddingInfo
from lkv.hf.queries import AllQueries, LastQueries, QueriesSnapshot
from lkv.hf.settings import Settings
from lkv.hf.token_log import Rotary, RotaryView, Rotations, TokenLog
from lkv.hf.versions import AttentionModule, output_projection
from lkv.policies import Carried, Observation
from lkv_ext import RaggedCache

T = TypeVar("T")


class ObservationBuffer:
    """What policies need beside the rows, as far as `Settings.observe` names it.

    Attributes:
        queries: of the last tokens. hidden_states, rotary: of all tokens; the rotary embedding is shared with the other
            layers that are given the same.
        all_queries: of the tokens since the last eviction; of generated ones where a cap evicts them.
        cosines: what attention did to each token, `[B, L, 1]`; NaN for padding and hidden tokens.
        hooked: whether a hook has to hand over what the attention module is called with.
        module: the attention module of the last call, for what is read of the model; borrowed: copies have the same.
        residual, padding: what came into the layer and the padding in it, on the way from one hook to the other.
        captured: what it was called with, on the way from its hook.
    """

    def __init__(self, settings: Settings, rotations: Rotations) -> None:
        self.rotations = rotations
        self.hooked = bool(settings.observe & HOOKED)
        self.captured: Captured | None = None
        self.queries = LastQueries(settings.observe_window) if "queries" in settings.observe else None
        self.all_queries = AllQueries() if "all_queries" in settings.observe else None
        self.borrows = bool(settings.observe & {"output_projection", "rotary"})
        self.module: Borrowed | None = None
        self.residual: Tensor | None = None
        self.padding: PaddingInfo | None = None
        self.hidden_states = TokenLog() if "hidden_states" in settings.observe else None
        self.cosines = TokenLog() if "attention_cosine" in settings.observe else None
        self.rotary: Rotary | None = None
        self.rotates = bool(settings.observe & {"pre_rope_keys", "rotary"})

    def push(
        self, module: AttentionModule, before: int, queries: Tensor, padding: PaddingInfo | None, lasting: bool
    ) -> None:
        """Adds what a layer knows of the tokens behind the first `before`: queries `[B, Hq, n, D]`, and its module.

        `lasting`: an eviction will follow. What is generated without a cap would fill the memory with queries.
        """
        if self.queries is not None:
            self.queries.push(queries, padding)
        if self.all_queries is not None and lasting:
            self.all_queries.push(before, queries, padding)
        if self.borrows:
            self.module = Borrowed(module)
        if self.residual is not None:
            self.padding = padding
        if self.hooked:
            self.push_captured(module, before, padding)

    def evicted(self) -> None:
        """The policy has chosen: what it has looked at is settled."""
        if self.all_queries is not None:
            self.all_queries.forget()

    def push_captured(self, module: AttentionModule, before: int, padding: PaddingInfo | None) -> None:
        """Adds what a hook has captured of the tokens behind the first `before`.

        Raises:
            ValueError: where no hook of this module was called.
        """
        captured, self.captured = self.captured, None
        if captured is None or captured.module is not module:
            raise ValueError(
                f"lkv.Cache: expected {type(module).__name__} {module.layer_idx} to be called with hooks, as hidden "
                "states or keys before RoPE are observed, got none: was the model compiled before?"
            )
        order = None if padding is None else padding.order
        if self.hidden_states is not None:
            self.hidden_states.push(captured.hidden_states, order)
        if self.rotates:
            cos, sin = captured.rotary
            if self.rotary is None:
                self.rotary = self.rotations.of(cos)
            self.rotary.push(before, cos, sin, order)

    def crop(self, tokens: int, length: int) -> None:
        """Forgets the last tokens; `length` are left."""
        if self.queries is not None:
            self.queries.crop(tokens)
        self._truncate(length)

    def hide(self, leaving: Tensor) -> None:
        """Tokens that a mask hides from now on: bool `[B, L]`, by position."""
        for part in (self.queries, self.all_queries):
            if part is not None:
                part.hide(leaving)
        if self.cosines is not None and self.cosines.length:
            self.cosines.blank(leaving)

    def select(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in that order. `Rotations` selects for all layers."""
        for part in (self.queries, self.all_queries, self.hidden_states, self.cosines):
            if part is not None:
                part.select(indices)

    def restore(self, queries: QueriesSnapshot | None, length: int) -> None:
        """Takes back what was pushed since `queries.snapshot()`; `length` tokens are left."""
        if self.queries is not None and queries is not None:
            self.queries.restore(queries)
        self._truncate(length)

    def drop_captured(self) -> None:
        """Forgets what hooks have handed over of a call that did not come to its end."""
        self.captured = self.residual = self.padding = None

    def _truncate(self, length: int) -> None:
        for part in (self.all_queries, self.hidden_states, self.cosines, self.rotary):
            if part is not None:
                part.truncate(length)
        if length == 0:
            self.rotary = None  # that of the cache is forgotten, too


class Borrowed:
    """A module of the model, which no copy of a cache copies."""

    def __init__(self, module: AttentionModule) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, object]) -> Borrowed:
        return self


class ObservedLayer(Protocol):
    """A layer as `observe` and a plan of its eviction see it: whole rows, or packed ones in `rows`.

    `rank`: which of the layers that are evicted it is, and how many there are.
    """

    index: int
    rank: tuple[int, int]
    rows: RaggedCache | None
    token_counts: list[int]
    evicted: int
    settings: Settings
    observations: ObservationBuffer
    scaling: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def heads(self) -> int: ...

    @property
    def row_counts(self) -> list[int]: ...

    def whole(self) -> tuple[Tensor, Tensor]: ...

    def carried(self) -> Carried | None: ...


def observe(layer: ObservedLayer, needs: frozenset[str], window: int) -> Observation:
    """The rows of a layer, whole or packed, and what is needed beside them, the queries of a window."""
    if layer.rows is None:
        keys, values = layer.whole()
        batch, heads, length = keys.shape[:3]
        lengths = torch.tensor(layer.token_counts, device=keys.device)[:, None].expand(batch, heads)
        starts = length - lengths
        positions = torch.arange(length, device=keys.device).expand(batch, heads, length)
    else:
        rows = layer.rows
        keys, values, positions = map(rows.padded, (rows.k, rows.v, rows.positions))
        lengths = rows.lengths.long()
        starts = torch.zeros_like(lengths)
    observations = layer.observations
    queries = places = filled = pre_rope = hidden = weight = cosine = rotary_view = None
    if "all_queries" in needs:
        all_queries = _observed(observations.all_queries, "all_queries")
        settled = (
            layer.rows is not None and layer.evicted == layer.rows.seen
        )  # and what is carried is all that there is
        if not (all_queries.empty and settled and layer.carried() is not None):
            queries, places, filled = all_queries.read()
    elif "queries" in needs:
        queries, places, filled = _observed(observations.queries, "queries").read(max(window, 1))
    if "pre_rope_keys" in needs:
        rotary = _observed(observations.rotary, "pre_rope_keys")
        pre_rope = rotary.undo(keys, None if layer.rows is None else positions)
    if "hidden_states" in needs:
        hidden = _observed(observations.hidden_states, "hidden_states").read().expand(len(keys), -1, -1)
    if "output_projection" in needs:
        weight = output_projection(_borrowed(observations))
    if "attention_cosine" in needs:
        each = _observed(observations.cosines, "attention_cosine").read()[..., 0]
        cosine = each.nansum(1) / each.isfinite().sum(1).clamp(min=1)
    if "rotary" in needs:
        embedding = rotary_embedding(_borrowed(observations))
        rotary_view = RotaryView(_observed(observations.rotary, "rotary"), embedding, layer.token_counts)
    return Observation(
        *(keys, values, positions, lengths, starts, queries, places, filled),
        *(layer.scaling, layer.softcap, hidden, pre_rope, layer.sinks, weight, cosine, rotary_view),
    )


def _borrowed(observations: ObservationBuffer) -> AttentionModule:
    """The attention module of the layer. Raises ValueError where no call has come with it."""
    if observations.module is None:
        raise ValueError(
            "lkv.Cache: expected a token since the cache was made or loaded, as the policy reads weights of the model, "
            "got none: feed one first"
        )
    return observations.module.module


def _observed(part: T | None, name: str) -> T:
    """What a policy needs. Raises ValueError where the cache does not observe it."""
    if part is None:
        raise ValueError(f"lkv.Cache: expected {name} to be observed, got none: make the cache with observe=[{name!r}]")
    return part
