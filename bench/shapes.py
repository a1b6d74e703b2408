"""What is measured: a cache, its scores and its budgets; or positions that are given rather than selected."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # bench/gpu.py imports this before it has built anything
    import lkv_ext

LENGTHS = (4096, 8192, 32768, 131072)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """`[batch, heads, length, dim]` of K and of V, keeping `retention` of the rows."""

    length: int
    heads: int = 8
    batch: int = 1
    dim: int = 128
    retention: float = 0.15
    dtype: torch.dtype = torch.bfloat16
    score_dtype: torch.dtype = torch.float32
    skewed: bool = False  # one head has 40 % of the budget, the others share the rest

    @property
    def budgets(self) -> int | list[int]:
        """Host budgets, an int where all heads have the same one."""
        uniform = max(1, int(self.retention * self.length))
        if not self.skewed:
            return uniform
        total = uniform * self.heads
        first = min(self.length, int(0.4 * total))
        each, extra = divmod(total - first, self.heads - 1)
        return [first] + [each + (head < extra) for head in range(self.heads - 1)]

    @property
    def per_segment(self) -> list[int]:
        """The budget of every (sequence, head)."""
        budgets = self.budgets
        return (budgets if isinstance(budgets, list) else [budgets] * self.heads) * self.batch

    @property
    def kept(self) -> int:
        """Rows in the output."""
        return sum(self.per_segment)

    @property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def output_bytes(self) -> int:
        return 2 * self.kept * self.row_bytes

    @property
    def cache_bytes(self) -> int:
        return 2 * self.batch * self.heads * self.length * self.row_bytes

    @property
    def score_bytes(self) -> int:
        return self.batch * self.heads * self.length * self.score_dtype.itemsize

    @property
    def moved_bytes(self) -> int:
        """Scores once; kept rows once in and once out."""
        return 2 * self.output_bytes + self.score_bytes

    def __str__(self) -> str:
        scores = "" if self.score_dtype == torch.float32 else f" {NAMES[self.score_dtype]} scores"
        sizes = f"[{self.batch}, {self.heads}, {self.length}, {self.dim}]"
        return f"{sizes} {NAMES[self.dtype]}{scores} {100 * self.retention:g}%{' skewed' * self.skewed}"


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a shape on a device."""

    shape: Shape
    k: Tensor
    v: Tensor
    scores: Tensor

    @property
    def budgets(self) -> Tensor:
        """int32 `[H]` on the host, as engines have them."""
        return torch.tensor(self.shape.per_segment[: self.shape.heads], dtype=torch.int32)

    @property
    def payload(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


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
    import lkv_ext

    batch, heads, count = positions.shape
    options = {"dtype": torch.int32, "device": positions.device}
    return lkv_ext.RaggedIndex(
        positions.to(torch.int32).reshape(-1),
        torch.full((batch, heads), count, **options),
        torch.arange(0, (batch * heads + 1) * count, count, **options),
        count,
    )
