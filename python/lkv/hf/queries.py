"""The last queries of a layer, for policies that score by what these attend to."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lkv.hf.masks import PaddingInfo
from lkv_ext.shared import keeps_tensors

# Attributes by their names in a file of `lkv.Cache.save`.
_STATE = {name.lstrip("_"): name for name in ("window", "seen", "_oldest", "_queries", "_places")} | {"real": "_filled"}


class LastQueries:
    """The queries of the last `window` tokens of every sequence, padding not counted.

    A ring, so that a decoding step writes one slot; several tokens at once put it in order. It has a slot more than the
    window, so that a step that is taken back has overwritten nothing.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._slots = window + 1
        self.seen = 0  # tokens, padding included
        self._oldest = 0  # slot
        self._queries: Tensor | None = None  # [B, Hq, w, D]
        self._places: Tensor | None = None  # int64 [B, w]
        self._filled: Tensor | None = None  # bool [B, w]: slots that hold a token
        self._run = 0  # the last tokens, which came one by one: their places are written down when somebody asks

    def push(self, queries: Tensor, padding: PaddingInfo | None = None) -> None:
        """Adds the queries of the next n tokens, `[B, Hq, n, D]`."""
        batch, heads, count, dim = queries.shape
        if self._queries is None:
            self._queries = queries.new_zeros(batch, heads, self._slots, dim)
            self._places = torch.zeros(batch, self._slots, dtype=torch.int64, device=queries.device)
            self._filled = torch.zeros_like(self._places, dtype=torch.bool)
        if count == 1 and padding is None:
            slot = self._oldest
            self._queries[:, :, slot] = queries[:, :, 0]
            self._run = min(self._run + 1, self._slots)
            self._oldest = (slot + 1) % self._slots
        else:
            if padding is not None and padding.order is not None:
                order = padding.order.to(queries.device)[:, None, :, None].expand(-1, heads, -1, dim)
                queries = queries.gather(2, order)
            self._rebuild(queries, None if padding is None else padding.counts)
        self.seen += count

    def read(self, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The last w queries `[B, Hq, w, D]`, their places `[B, w]`, which slots hold one, bool `[B, w]`; in order."""
        return self._in_order(self.window if last is None else min(last, self.window))

    def state(self) -> dict[str, object]:
        """All of it, for `load`."""
        self._write_down()
        return {key: getattr(self, name) for key, name in _STATE.items()}

    def load(self, state: dict[str, object], batch: int, length: int) -> None:
        """What `state` gave.

        Raises:
            ValueError: for another window, and what is not of `batch` sequences of `length` tokens.
        """
        queries, places, filled = state["queries"], state["places"], state["real"]
        shape = (batch, self._slots)
        right = (state["window"], state["seen"]) == (self.window, length) and 0 <= state["oldest"] < self._slots
        if queries is not None:
            right &= tuple(places.shape) == tuple(filled.shape) == shape == (queries.shape[0], queries.shape[2])
            right = right and places.dtype == torch.int64 and filled.dtype == torch.bool
        if not right:
            raise ValueError(
                f"lkv.Cache.load: expected the last {self.window} queries of {batch} sequences, got others"
            )
        self.seen, self._oldest = state["seen"], state["oldest"]
        self._queries, self._places, self._filled = queries, places, filled

    def snapshot(self) -> LastQueries:
        """What to go on with instead of this if what is pushed from now on shall not have been."""
        return copy.copy(self)

    @keeps_tensors
    def crop(self, tokens: int) -> None:
        """Forgets the last tokens; those that they had pushed out do not come back."""
        if self._filled is None or tokens == 0:
            return
        self._write_down()
        self.seen -= tokens
        self._filled = self._filled & (self._places < self.seen)
        self._oldest = (self._oldest - tokens) % self._slots

    @keeps_tensors
    def hide(self, leaving: Tensor) -> None:
        """The queries of some tokens do not count any more: bool `[B, L]`, by place."""
        if self._filled is not None:
            self._write_down()
            at = self._places.clamp(max=leaving.shape[1] - 1)
            self._filled = self._filled & ~leaving.to(self._filled.device).gather(1, at)
            self._rebuild(self._queries[:, :, :0], None)

    @keeps_tensors
    def select(self, indices: Tensor) -> None:
        """Sequences `indices`, in that order."""
        if self._queries is not None:
            self._write_down()
            chosen = indices.to(self._queries.device).clone()
            self._queries, self._places, self._filled = (t[chosen] for t in (self._queries, self._places, self._filled))

    def _write_down(self) -> None:
        """Makes new tensors: a snapshot may have the old ones."""
        if self._run:
            back = torch.arange(self._run, 0, -1, device=self._places.device)
            slots, new = (self._oldest - back) % self._slots, self.seen - back
            self._places = self._places.index_copy(1, slots, new.expand(len(self._places), -1))
            self._filled = self._filled.index_fill(1, slots, True)
            self._run = 0

    def _in_order(self, last: int) -> tuple[Tensor, Tensor, Tensor]:
        self._write_down()
        slots = torch.arange(self._slots - last, self._slots, device=self._places.device)
        slots = (slots + self._oldest) % self._slots
        places = self._places[:, slots]
        # A step that was taken back may have left its query in a slot, but no place of now.
        return self._queries[:, :, slots], places, self._filled[:, slots] & (places < self.seen)

    def _rebuild(self, queries: Tensor, valid: Sequence[int] | None) -> None:
        batch, heads, count, dim = queries.shape
        taken, device = min(count, self._slots), queries.device
        old, places, filled = self._in_order(self._slots)
        new = torch.arange(self.seen + count - taken, self.seen + count, device=device)
        behind = torch.arange(taken, 0, -1, device=device)
        limit = torch.tensor([[count]] * batch if valid is None else [[n] for n in valid], device=device)
        queries = torch.cat([old, queries[:, :, count - taken :]], 2)
        places, filled = torch.cat([places, new.expand(batch, -1)], 1), torch.cat([filled, behind <= limit], 1)
        order = filled.byte().argsort(dim=1, stable=True)[:, -self._slots :]  # what holds no token comes first
        self._queries = queries.gather(2, order[:, None, :, None].expand(-1, heads, -1, dim))
        self._places, self._filled = places.gather(1, order), filled.gather(1, order)
        self._oldest = 0
