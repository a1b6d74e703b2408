"""What is held of one layer beside its rows, and what a policy is shown of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lkv.hf.capture import HOOKED, Captured
from lkv.hf.masks import PaddingInfo
from lkv.hf.queries import LastQueries
from lkv.hf.token_log import Rotary, TokenLog
from lkv.policies import Observation

if TYPE_CHECKING:
    from lkv.hf.layer import RaggedLayer
    from lkv.hf.session import Session


class ObservationBuffer:
    """What policies need beside the rows, as far as the settings say that it is held.

    Attributes:
        captured: what the layer's attention module was called with, on the way from its hook.
    """

    def __init__(self, session: Session) -> None:
        settings = session.settings
        self.session = session
        self.hooked = bool(settings.observe & HOOKED)
        self.captured: Captured | None = None
        self.queries = LastQueries(settings.observe_window) if "queries" in settings.observe else None
        self.hidden_states = TokenLog() if "hidden_states" in settings.observe else None
        self.rotary: Rotary | None = None  # shared with other layers
        self.rotates = "pre_rope_keys" in settings.observe

    def push(self, module: nn.Module, before: int, queries: Tensor, padding: PaddingInfo | None) -> None:
        """Of the tokens behind the first `before`: queries `[B, Hq, n, D]`, padding first, and what was captured.

        Raises:
            ValueError: where no hook of this module was called.
        """
        if self.queries is not None:
            self.queries.push(queries, padding)
        if not self.hooked:
            return
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
                self.rotary = self.session.rotary(cos)
            self.rotary.push(before, cos, sin, order)

    def crop(self, tokens: int, length: int) -> None:
        """Forgets the last tokens; `length` are left."""
        if self.queries is not None:
            self.queries.crop(tokens)
        self._truncate(length)

    def hide(self, leaving: Tensor) -> None:
        """Some tokens are none any more: bool `[B, L]`, by position."""
        if self.queries is not None:
            self.queries.hide(leaving)

    def select(self, indices: Tensor) -> None:
        """Sequences `indices`, in that order. The rotations are the session's to select."""
        for part in (self.queries, self.hidden_states):
            if part is not None:
                part.select(indices)

    def snapshot(self) -> LastQueries | None:
        """For `restore`."""
        return None if self.queries is None else self.queries.snapshot()

    def restore(self, snapshot: LastQueries | None, length: int) -> None:
        self.queries = snapshot
        self._truncate(length)

    def _truncate(self, length: int) -> None:
        for part in (self.hidden_states, self.rotary):
            if part is not None:
                part.truncate(length)
        if length == 0:
            self.rotary = None  # the session's are gone, too


def observe(layer: RaggedLayer, needs: frozenset[str], window: int) -> Observation:
    """The rows of a layer, whole or packed, and what is needed beside them, as many queries as the window says."""
    if layer.rows is None:
        keys, values = layer.keys, layer.values
        batch, heads, length = keys.shape[:3]
        lengths = torch.tensor(layer.token_counts, device=keys.device)[:, None].expand(batch, heads)
        starts = length - lengths
        positions = torch.arange(length, device=keys.device).expand(batch, heads, length)
    else:
        rows = layer.rows
        keys, values, positions = map(rows.padded, (rows.k, rows.v, rows.positions))
        lengths = rows.lengths.long()
        starts = torch.zeros_like(lengths)
    observations, queries = layer.observations, (None, None, None)
    if "queries" in needs:
        queries = observations.queries.read(max(window, 1))
    pre_rope = hidden = None
    if "pre_rope_keys" in needs:
        pre_rope = observations.rotary.undo(keys, None if layer.rows is None else positions)
    if "hidden_states" in needs:
        hidden = observations.hidden_states.read().expand(len(keys), -1, -1)
    return Observation(
        keys, values, positions, lengths, starts, *queries, layer.scaling, layer.softcap, hidden, pre_rope, layer.sinks
    )
