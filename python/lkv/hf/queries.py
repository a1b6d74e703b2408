"""Queries of a layer, for policies that score by what these attend to: the last ones, or all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkv.hf.masks import PaddingInfo
from lkv_ext.shared import keeps_tensors


class Slots(NamedTuple):
    """Queries of the last tokens, in order.

    Attributes:
        queries: `[B, Hq, s, D]`.
        places: int64 `[B, s]`, which tokens they are of.
        filled: bool `[B, s]`, which slots hold a token.
    """

    queries: Tensor
    places: Tensor
    filled: Tensor


QueriesSnapshot = tuple[int, list[Tensor], int, Slots | None]  # tokens, steps, how many of these, slots


class LastQueries:
    """The queries of the last `window` tokens of every sequence, padding not counted.

    Those of a decoding step are only noted in a list; they are appended to the others on `read`, and when the list
    is as long as the window. There is a slot more than the window: where the last token is hidden, an earlier one
    takes its place. Tensors are never written to, so that snapshots and copies share them.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._count = window + 1
        self.seen = 0  # tokens, padding included
        self._steps: list[Tensor] = []  # [B, Hq, 1, D], the last tokens
        self._slots: Slots | None = None  # of the tokens before these

    def push(self, queries: Tensor, padding: PaddingInfo | None = None) -> None:
        """Adds the queries of the next n tokens, `[B, Hq, n, D]`."""
        count = queries.shape[2]
        if count == 1 and padding is None:
            if len(self._steps) >= self._count:
                self._put_together()
            self._steps.append(queries.detach())
        else:
            self._extend(queries, padding)
        self.seen += count

    def read(self, last: int | None = None) -> Slots:
        """The last w queries `[B, Hq, w, D]`, their places `[B, w]`, which slots hold one, bool `[B, w]`; in order.

        Raises:
            ValueError: before any token has come.
        """
        slots = self._put_together()
        if slots is None:
            raise ValueError("lkv.Cache: expected queries of tokens so far, got none: feed a prompt first")
        first = self._count - (self.window if last is None else min(last, self.window))
        return Slots(slots.queries[:, :, first:], slots.places[:, first:], slots.filled[:, first:])

    def state(self) -> dict[str, object]:
        """All of it, for `load`."""
        queries, places, filled = self._put_together() or (None, None, None)
        parts = {"queries": queries, "places": places, "real": filled}
        return {"window": self.window, "seen": self.seen, "oldest": 0, **parts}

    def load(self, state: Mapping[str, Any], batch: int, length: int) -> None:
        """What `state` gave.

        Raises:
            ValueError: for another window, and what is not of `batch` sequences of `length` tokens.
        """
        queries, places, filled = state["queries"], state["places"], state["real"]
        shape = (batch, self._count)
        right = (state["window"], state["seen"]) == (self.window, length) and 0 <= state["oldest"] < self._count
        if queries is not None:
            right &= tuple(places.shape) == tuple(filled.shape) == shape == (queries.shape[0], queries.shape[2])
            right = right and places.dtype == torch.int64 and filled.dtype == torch.bool
        if not right:
            raise ValueError(
                f"lkv.Cache.load: expected the last {self.window} queries of {batch} sequences, got others"
            )
        if queries is not None:  # files may hold a ring
            back = -state["oldest"]
            queries, places, filled = queries.roll(back, 2), places.roll(back, 1), filled.roll(back, 1)
            filled = filled & (places < length)
        self.seen = state["seen"]
        self._slots = None if queries is None else Slots(queries, places, filled)

    def snapshot(self) -> QueriesSnapshot:
        """For `restore`."""
        return self.seen, self._steps, len(self._steps), self._slots

    def __deepcopy__(self, memo: dict[int, object]) -> LastQueries:
        other = copy.copy(self)
        other._steps = list(self._steps)
        return other

    def restore(self, snapshot: QueriesSnapshot) -> None:
        """Takes back what was pushed since."""
        self.seen, steps, count, self._slots = snapshot
        self._steps = steps[:count]

    @keeps_tensors
    def crop(self, tokens: int) -> None:
        """Forgets the last tokens; those that they had pushed out do not come back."""
        slots = self._put_together() if self.seen and tokens else None
        if slots is not None:
            self.seen -= tokens
            self._keep_last(slots._replace(filled=slots.filled & (slots.places < self.seen)))

    @keeps_tensors
    def hide(self, leaving: Tensor) -> None:
        """The queries of some tokens do not count any more: bool `[B, L]`, by place."""
        slots = self._put_together() if self.seen else None
        if slots is not None:
            at = slots.places.clamp(max=leaving.shape[1] - 1)
            hidden = leaving.to(slots.filled.device).gather(1, at)
            self._keep_last(slots._replace(filled=slots.filled & ~hidden))

    @keeps_tensors
    def select(self, indices: Tensor) -> None:
        """Sequences `indices`, in that order."""
        slots = self._put_together() if self.seen else None
        if slots is not None:
            chosen = indices.to(slots.queries.device).clone()
            self._slots = Slots(*(t[chosen] for t in slots))

    @keeps_tensors
    def _put_together(self) -> Slots | None:
        """Moves the noted steps behind the others; None before any token."""
        if self._steps:
            steps, self._steps = self._steps, []
            self._append(torch.cat(steps, 2), self.seen - len(steps), None)
        return self._slots

    @keeps_tensors
    def _extend(self, queries: Tensor, padding: PaddingInfo | None) -> None:
        self._put_together()
        if padding is not None and padding.order is not None:
            queries = _by_place(queries, padding.order.to(queries.device))
        self._append(queries.detach(), self.seen, None if padding is None else padding.counts)

    def _append(self, queries: Tensor, first: int, valid: Sequence[int] | None) -> None:
        """Queries `[B, Hq, n, D]` of the tokens from `first` on, of which the last `valid` of a sequence count."""
        batch, heads, count, dim = queries.shape
        device = queries.device
        old = self._slots
        if old is None:
            nowhere = torch.zeros(batch, self._count, dtype=torch.int64, device=device)
            old = Slots(queries.new_zeros(batch, heads, self._count, dim), nowhere, nowhere.bool())
        taken = min(count, self._count)
        places = torch.arange(first + count - taken, first + count, device=device).expand(batch, -1)
        filled = torch.ones_like(places, dtype=torch.bool)
        if valid is not None:
            filled = torch.arange(taken, 0, -1, device=device) <= torch.tensor([[n] for n in valid], device=device)
        self._keep_last(
            Slots(
                torch.cat([old.queries, queries[:, :, count - taken :]], 2),
                torch.cat([old.places, places], 1),
                torch.cat([old.filled, filled], 1),
            )
        )

    def _keep_last(self, slots: Slots) -> None:
        """The last slots that hold a token, behind those that hold none."""
        queries, places, filled = slots
        order = filled.byte().argsort(dim=1, stable=True)[:, -self._count :]
        self._slots = Slots(_by_place(queries, order), places.gather(1, order), filled.gather(1, order))


class AllQueries:
    """The queries of all tokens since the last eviction; tensors are never written to, and shared by copies.

    G times the bytes of the keys, or as many for each head: of layers that are evicted one by one, one at a time.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, Slots]] = []  # with the place of the first token

    @keeps_tensors
    def push(self, first: int, queries: Tensor, padding: PaddingInfo | None) -> None:
        """The queries `[B, Hq, n, D]` of the tokens from place `first` on."""
        batch, _, count, _ = queries.shape
        places = torch.arange(first, first + count, device=queries.device).expand(batch, -1)
        filled = torch.ones_like(places, dtype=torch.bool)
        if padding is not None:
            if padding.order is not None:
                queries = _by_place(queries, padding.order.to(queries.device))
            counts = torch.tensor(padding.counts, device=queries.device)
            filled = torch.arange(count, 0, -1, device=queries.device) <= counts[:, None]
        self._parts.append((first, Slots(queries.detach(), places, filled)))

    @keeps_tensors
    def read(self) -> Slots:
        """`[B, Hq, n, D]`, their places and which of them are there, `[B, n]` each; in order.

        Raises:
            ValueError: where none has come since the last eviction.
        """
        if not self._parts:
            raise ValueError(
                "lkv.Cache: expected queries of tokens since the last eviction, got none: feed a prompt first (those "
                "of generated tokens are stored where there is a cap alone)"
            )
        if len(self._parts) > 1:
            slots = [part for _, part in self._parts]
            queries = torch.cat([part.queries for part in slots], 2)
            places, filled = (torch.cat(parts, 1) for parts in list(zip(*slots, strict=True))[1:])
            self._parts = [(self._parts[0][0], Slots(queries, places, filled))]
        return self._parts[0][1]

    @property
    def empty(self) -> bool:
        """No query has come since the last eviction."""
        return not self._parts

    def forget(self) -> None:
        """After an eviction: what rows have received is settled."""
        self._parts = []

    def truncate(self, length: int) -> None:
        """Forgets all tokens from place `length` on."""
        kept = []
        for first, (queries, places, filled) in self._parts:
            count = int((places[0] < length).sum()) if first < length else 0
            if count:
                kept.append((first, Slots(queries[:, :, :count], places[:, :count], filled[:, :count])))
        self._parts = kept

    @keeps_tensors
    def hide(self, leaving: Tensor) -> None:
        """The queries of some tokens do not count any more: bool `[B, L]`, by place."""
        for n, (first, slots) in enumerate(self._parts):
            at = slots.places.clamp(max=leaving.shape[1] - 1)
            hidden = leaving.to(at.device).gather(1, at) & (slots.places < leaving.shape[1])
            self._parts[n] = first, slots._replace(filled=slots.filled & ~hidden)

    @keeps_tensors
    def select(self, indices: Tensor) -> None:
        """Sequences `indices`, in that order."""
        for n, (first, slots) in enumerate(self._parts):
            chosen = indices.to(slots.queries.device).clone()
            self._parts[n] = first, Slots(*(t[chosen] for t in slots))

    def state(self) -> dict[str, Tensor] | None:
        """All of it, for `load`."""
        return self.read()._asdict() if self._parts else None

    def load(self, state: Mapping[str, Any] | None, batch: int, length: int) -> None:
        """What `state` gave. Raises ValueError for what is not of `batch` sequences of at most `length` tokens."""
        if state is None:
            return
        slots = Slots(*(state[name] for name in Slots._fields))
        right = slots.queries.dim() == 4 and slots.queries.shape[0] == batch
        right = right and slots.places.shape == slots.filled.shape == (batch, slots.queries.shape[2])
        if not right or int(slots.places.max()) >= length or slots.filled.dtype != torch.bool:
            raise ValueError(f"lkv.Cache.load: expected queries of {batch} sequences of {length} tokens, got others")
        self._parts = [(int(slots.places.min()), slots)]

    def __deepcopy__(self, memo: dict[int, object]) -> AllQueries:
        other = AllQueries()
        other._parts = list(self._parts)
        return other


def _by_place(queries: Tensor, order: Tensor) -> Tensor:
    """`[B, Hq, n, D]` by `[B, m]`."""
    return queries.gather(2, order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
