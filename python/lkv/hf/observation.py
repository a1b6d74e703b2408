"""What is kept of a layer beside its rows, and what a policy sees of both."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lkv.hf.capture import HOOKED, Captured
from lkv.hf.masks import PaddingInfo
from lkv.hf.queries import LastQueries, QueriesSnapshot
from lkv.hf.settings import Settings
from lkv.hf.token_log import Rotary, Rotations, TokenLog
from lkv.hf.versions import AttentionModule
from lkv.policies import Observation
from lkv_ext import RaggedCache

T = TypeVar("T")


class ObservationBuffer:
    """What policies need beside the rows, as far as `Settings.observe` names it.

    Attributes:
        queries: of the last tokens. hidden_states, rotary: of all tokens; the rotary embedding is shared with the other
            layers that are given the same.
        hooked: whether a hook has to hand over what the attention module is called with.
        captured: what it was called with, on the way from its hook.
    """

    def __init__(self, settings: Settings, rotations: Rotations) -> None:
        self.rotations = rotations
        self.hooked = bool(settings.observe & HOOKED)
        self.captured: Captured | None = None
        self.queries = LastQueries(settings.observe_window) if "queries" in settings.observe else None
        self.hidden_states = TokenLog() if "hidden_states" in settings.observe else None
        self.rotary: Rotary | None = None
        self.rotates = "pre_rope_keys" in settings.observe

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
        if self.queries is not None:
            self.queries.hide(leaving)

    def select(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in that order. `Rotations` selects for all layers."""
        for part in (self.queries, self.hidden_states):
            if part is not None:
                part.select(indices)

    def restore(self, queries: QueriesSnapshot | None, length: int) -> None:
        """Takes back what was pushed since `queries.snapshot()`; `length` tokens are left."""
        if self.queries is not None and queries is not None:
            self.queries.restore(queries)
        self.captured = None
        self._truncate(length)

    def _truncate(self, length: int) -> None:
        for part in (self.hidden_states, self.rotary):
            if part is not None:
                part.truncate(length)
        if length == 0:
            self.rotary = None  # that of the cache is forgotten, too


class ObservedLayer(Protocol):
    """A layer as `observe` and a plan of its eviction see it: whole rows, or packed ones in `rows`."""

    index: int
    rows: RaggedCache | None
    token_counts: list[int]
    row_counts: list[int]
    observations: ObservationBuffer
    scaling: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def heads(self) -> int: ...

    def whole(self) -> tuple[Tensor, Tensor]: ...


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
    queries = places = filled = pre_rope = hidden = None
    if "queries" in needs:
        queries, places, filled = _observed(observations.queries, "queries").read(max(window, 1))
    if "pre_rope_keys" in needs:
        rotary = _observed(observations.rotary, "pre_rope_keys")
        pre_rope = rotary.undo(keys, None if layer.rows is None else positions)
    if "hidden_states" in needs:
        hidden = _observed(observations.hidden_states, "hidden_states").read().expand(len(keys), -1, -1)
    return Observation(
        *(keys, values, positions, lengths, starts, queries, places, filled),
        *(layer.scaling, layer.softcap, hidden, pre_rope, layer.sinks),
    )


def _observed(part: T | None, name: str) -> T:
    """What a policy needs. Raises ValueError where the cache does not observe it."""
    if part is None:
        raise ValueError(f"lkv.Cache: expected {name} to be observed, got none: make the cache with observe=[{name!r}]")
    return part
