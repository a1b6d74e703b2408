"""A model of RaggedCache: a list of rows for every head."""

from __future__ import annotations

import torch
from cases import generator, scores_of
from torch import Tensor

from lkv_ext import RaggedCache

BATCH, HEADS, DIM, DIM_V = 2, 3, 8, 4


class Model:
    """What a cache should hold: per segment, (position, k, v) in order."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(BATCH * HEADS)]
        self.seen = 0

    def append(self, k: Tensor, v: Tensor, valid: list[int] | None = None) -> None:
        n = k.shape[2]
        for r, rows in enumerate(self.rows):
            b, h = divmod(r, HEADS)
            skip = n - (n if valid is None else valid[b])
            rows += [(self.seen + i, k[b, h, i], v[b, h, i]) for i in range(skip, n)]
        self.seen += n

    def evict(self, scores: list[Tensor], budgets: list[int]) -> None:
        for r, rows in enumerate(self.rows):
            order = scores[r].sort(descending=True, stable=True).indices[: budgets[r % HEADS]]
            self.rows[r] = [rows[i] for i in sorted(order.tolist())]

    def check(self, cache: RaggedCache) -> None:
        assert cache.seen == self.seen
        lengths = [len(rows) for rows in self.rows]
        assert cache.lengths.flatten().tolist() == lengths and cache.max_length >= max(lengths)
        for r, rows in enumerate(self.rows):
            begin = int(cache.cu_seqlens[r])
            span = slice(begin, begin + len(rows))
            assert span.stop <= int(cache.cu_seqlens[r + 1])
            assert cache.positions[span].tolist() == [position for position, _, _ in rows]
            for mine, i in ((cache.k, 1), (cache.v, 2)):
                assert all(torch.equal(a.cpu(), row[i]) for a, row in zip(mine[span], rows, strict=True))


def tokens(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(100 * n + seed)
    k, v = (torch.randn(BATCH, n, HEADS, d, generator=g).transpose(1, 2) for d in (DIM, DIM_V))
    return k, v


def filled(device: str = "cpu", reserve: int = 4) -> tuple[RaggedCache, Model]:
    cache, model = RaggedCache.empty(BATCH, HEADS, DIM, dim_v=DIM_V, device=device, reserve=reserve), Model()
    for seed, n in enumerate((3, 1, 20, 1)):
        k, v = tokens(n, seed)
        cache.append(k.to(device), v.to(device))
        model.append(k, v)
    return cache, model


def evict(cache: RaggedCache, model: Model, budgets: list[int], **options) -> None:
    scores = scores_of("normal", [BATCH, HEADS, cache.max_length]).to(cache.device)
    used = [scores[r // HEADS, r % HEADS, : len(rows)].cpu() for r, rows in enumerate(model.rows)]
    cache.evict(cache.packed(scores), budgets, **options)
    model.evict(used, budgets)
