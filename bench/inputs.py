"""The tensors of a shape; or positions that are given rather than selected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import ceil

import torch
from shapes import Shape
from torch import Tensor

import lkv_ext


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of one layer of a shape on a device."""

    shape: Shape
    k: Tensor
    v: Tensor
    scores: Tensor

    @cached_property
    def budgets(self) -> Tensor:
        """int32 `[H]` on the host, as engines have them."""
        return torch.tensor(self.shape.per_segment[: self.shape.heads], dtype=torch.int32)

    @property
    def payload(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v

    def evict(self, out: lkv_ext.RaggedKV | None = None) -> lkv_ext.RaggedKV:
        return lkv_ext.evict(self.k, self.v, self.scores, self.budgets, out=out)

    def evict_warm(self) -> Callable[[], lkv_ext.RaggedKV]:
        """`evict` into memory that is there already."""
        return partial(self.evict, self.evict())


def make_inputs(shape: Shape, device: str) -> Inputs:
    """Random K, V and scores; the large tensors are shared by calls in a row that differ in budgets alone."""
    sizes = (shape.batch, shape.heads, shape.length, shape.dim)
    k, v = _cache(sizes, shape.dtype, device)
    generator = torch.Generator(device).manual_seed(shape.length)
    scores = torch.randn(sizes[:3], generator=generator, device=device).to(shape.score_dtype)
    return Inputs(shape, k, v, scores)


@lru_cache(maxsize=1)
def _cache(sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    # One random block over and over: rows move as bytes, and drawing half a gigabyte would take longer than measuring.
    count = dtype.itemsize * sizes[0] * sizes[1] * sizes[2] * sizes[3]
    block = torch.randint(0, 120, (min(count, 1 << 24),), dtype=torch.uint8, device=device)
    repeated = block.repeat(ceil(count / block.numel()))[:count]
    return repeated.view(dtype).view(sizes), repeated.clone().view(dtype).view(sizes)


def runs_of(shape: Shape, run: int, device: str) -> Tensor:
    """Ascending positions `[B, H, n]`, the same number for each: random disjoint runs of `run` rows, the last cut.

    Runs begin at multiples of `run`, so neighbours may join.
    """
    count = shape.per_segment[0]
    if run >= count:
        return torch.arange(count, device=device).expand(shape.batch, shape.heads, -1)
    generator = torch.Generator(device).manual_seed(run)
    order = torch.rand(shape.batch, shape.heads, shape.length // run, generator=generator, device=device)
    first = order.topk(ceil(count / run), dim=-1).indices.sort(dim=-1).values * run
    return (first[..., None] + torch.arange(run, device=device)).flatten(-2)[..., :count]


def index_of(positions: Tensor) -> lkv_ext.RaggedIndex:
    """The packed index of positions `[B, H, n]`."""
    batch, heads, count = positions.shape
    options = {"dtype": torch.int32, "device": positions.device}
    return lkv_ext.RaggedIndex(
        positions.to(torch.int32).reshape(-1),
        torch.full((batch, heads), count, **options),
        torch.arange(0, (batch * heads + 1) * count, count, **options),
        count,
    )
