"""The last queries of a layer, for policies that score by what these attend to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkv.hf.modes import keeps_tensors


class LastQueries:
    """The queries of the last `window` tokens of every sequence, padding not counted.

    A ring, so that a decoding step writes one slot; several tokens at once put it in order.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen = 0  # tokens, padding included
        self._oldest = 0  # slot
        self._queries: Tensor | None = None  # [B, Hq, w, D]
        self._places: Tensor | None = None  # int64 [B, w]
        self._real: Tensor | None = None  # bool [B, w]: slots that hold a token

    @keeps_tensors
    def push(self, queries: Tensor, valid: Sequence[int] | None) -> None:
        """Adds the queries of the next n tokens, `[B, Hq, n, D]`, the last `valid[b]` of them real."""
        batch, heads, count, dim = queries.shape
        if self._queries is None:
            self._queries = queries.new_zeros(batch, heads, self.window, dim)
            self._places = torch.zeros(batch, self.window, dtype=torch.int64, device=queries.device)
            self._real = torch.zeros_like(self._places, dtype=torch.bool)
        if count == 1 and valid is None:
            slot = self._oldest
            self._queries[:, :, slot] = queries[:, :, 0]
            self._places[:, slot] = self.seen
            self._real[:, slot] = True
            self._oldest = (slot + 1) % self.window
        else:
            self._rebuild(queries, valid)
        self.seen += count

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, Hq, w, D]`, their places `[B, w]`, and which slots hold one, bool `[B, w]`; in order."""
        slots = (torch.arange(self.window, device=self._places.device) + self._oldest) % self.window
        return self._queries[:, :, slots], self._places[:, slots], self._real[:, slots]

    @keeps_tensors
    def crop(self, tokens: int) -> None:
        """Forgets the last tokens; those that they had pushed out do not come back."""
        if self._real is None or tokens == 0:
            return
        self.seen -= tokens
        self._real &= self._places < self.seen
        self._oldest = (self._oldest - tokens) % self.window

    @keeps_tensors
    def select(self, indices: Tensor) -> None:
        """Sequences `indices`, in that order."""
        if self._queries is not None:
            with torch.inference_mode(False):
                chosen = indices.to(self._queries.device).clone()
                self._queries, self._places, self._real = (t[chosen] for t in (self._queries, self._places, self._real))

    def _rebuild(self, queries: Tensor, valid: Sequence[int] | None) -> None:
        batch, heads, count, dim = queries.shape
        taken, device = min(count, self.window), queries.device
        old, places, real = self.read()
        new = torch.arange(self.seen + count - taken, self.seen + count, device=device)
        behind = torch.arange(taken, 0, -1, device=device)
        limit = torch.tensor([[count]] * batch if valid is None else [[n] for n in valid], device=device)
        queries = torch.cat([old, queries[:, :, count - taken :]], 2)
        places, real = torch.cat([places, new.expand(batch, -1)], 1), torch.cat([real, behind <= limit], 1)
        order = real.byte().argsort(dim=1, stable=True)[:, -self.window :]  # what holds no token comes first
        self._queries = queries.gather(2, order[:, None, :, None].expand(-1, heads, -1, dim))
        self._places, self._real = places.gather(1, order), real.gather(1, order)
        self._oldest = 0
