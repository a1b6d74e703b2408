"""The last queries of a layer, for policies that score by what these attend to."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lkv.hf.masks import PaddingInfo
from lkv_ext.shared import keeps_tensors


class LastQueries:
    """The queries of the last `window` tokens of every sequence, padding not counted.

    Those of a decoding step are only noted in a list; they are appended to the others on `read`, and when the list
    is as long as the window. There is a slot more than the window: where the last token is hidden, an earlier one
    takes its place. Tensors are never written to, so that snapshots and copies share them.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._slots = window + 1
        self.seen = 0  # tokens, padding included
        self._steps: list[Tensor] = []  # [B, Hq, 1, D], the last tokens
        # Before these, in order: queries [B, Hq, s, D], places int64 [B, s], and which slots hold a token, bool [B, s].
        self._queries: Tensor | None = None
        self._places: Tensor | None = None
        self._filled: Tensor | None = None

    def push(self, queries: Tensor, padding: PaddingInfo | None = None) -> None:
        """Adds the queries of the next n tokens, `[B, Hq, n, D]`."""
        count = queries.shape[2]
        if count == 1 and padding is None:
            if len(self._steps) >= self._slots:
                self._put_together()
            self._steps.append(queries.detach())
        else:
            self._extend(queries, padding)
        self.seen += count

    def read(self, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The last w queries `[B, Hq, w, D]`, their places `[B, w]`, which slots hold one, bool `[B, w]`; in order."""
        self._put_together()
        first = self._slots - (self.window if last is None else min(last, self.window))
        return self._queries[:, :, first:], self._places[:, first:], self._filled[:, first:]

    def state(self) -> dict[str, object]:
        """All of it, for `load`."""
        self._put_together()
        parts = {"queries": self._queries, "places": self._places, "real": self._filled}
        return {"window": self.window, "seen": self.seen, "oldest": 0, **parts}

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
        if queries is not None:  # files may hold a ring
            back = -state["oldest"]
            queries, places, filled = queries.roll(back, 2), places.roll(back, 1), filled.roll(back, 1)
            filled = filled & (places < length)
        self.seen = state["seen"]
        self._queries, self._places, self._filled = queries, places, filled

    def snapshot(self) -> tuple[object, ...]:
        """For `restore`."""
        return self.seen, self._steps, len(self._steps), self._queries, self._places, self._filled

    def __deepcopy__(self, memo: dict[int, object]) -> LastQueries:
        other = copy.copy(self)
        other._steps = list(self._steps)
        return other

    def restore(self, snapshot: tuple[object, ...]) -> None:
        """Takes back what was pushed since."""
        self.seen, steps, count, self._queries, self._places, self._filled = snapshot
        self._steps = steps[:count]

    @keeps_tensors
    def crop(self, tokens: int) -> None:
        """Forgets the last tokens; those that they had pushed out do not come back."""
        if self.seen == 0 or tokens == 0:
            return
        self._put_together()
        self.seen -= tokens
        self._filled = self._filled & (self._places < self.seen)
        self._keep_last(self._queries, self._places, self._filled)

    @keeps_tensors
    def hide(self, leaving: Tensor) -> None:
        """The queries of some tokens do not count any more: bool `[B, L]`, by place."""
        if self.seen:
            self._put_together()
            at = self._places.clamp(max=leaving.shape[1] - 1)
            filled = self._filled & ~leaving.to(self._filled.device).gather(1, at)
            self._keep_last(self._queries, self._places, filled)

    @keeps_tensors
    def select(self, indices: Tensor) -> None:
        """Sequences `indices`, in that order."""
        if self.seen:
            self._put_together()
            chosen = indices.to(self._queries.device).clone()
            self._queries, self._places, self._filled = (t[chosen] for t in (self._queries, self._places, self._filled))

    @keeps_tensors
    def _put_together(self) -> None:
        """Moves the noted steps behind the others."""
        if self._steps:
            steps, self._steps = self._steps, []
            self._append(torch.cat(steps, 2), self.seen - len(steps), None)

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
        if self._queries is None:
            self._queries = queries.new_zeros(batch, heads, self._slots, dim)
            self._places = torch.zeros(batch, self._slots, dtype=torch.int64, device=device)
            self._filled = torch.zeros_like(self._places, dtype=torch.bool)
        taken = min(count, self._slots)
        places = torch.arange(first + count - taken, first + count, device=device).expand(batch, -1)
        filled = torch.ones_like(places, dtype=torch.bool)
        if valid is not None:
            filled = torch.arange(taken, 0, -1, device=device) <= torch.tensor([[n] for n in valid], device=device)
        self._keep_last(
            torch.cat([self._queries, queries[:, :, count - taken :]], 2),
            torch.cat([self._places, places], 1),
            torch.cat([self._filled, filled], 1),
        )

    def _keep_last(self, queries: Tensor, places: Tensor, filled: Tensor) -> None:
        """The last slots that hold a token, behind those that hold none."""
        order = filled.byte().argsort(dim=1, stable=True)[:, -self._slots :]
        self._queries = _by_place(queries, order)
        self._places, self._filled = places.gather(1, order), filled.gather(1, order)


def _by_place(queries: Tensor, order: Tensor) -> Tensor:
    """`[B, Hq, n, D]` by `[B, m]`."""
    return queries.gather(2, order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
