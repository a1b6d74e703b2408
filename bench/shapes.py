"""What is measured: sizes and types of a cache, and how much of it is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

LENGTHS = (4096, 8192, 32768, 131072)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """`layers` times `[batch, heads, length, dim]` of K and of V, keeping `retention` of the rows."""

    length: int
    heads: int = 8
    batch: int = 1
    dim: int = 128
    retention: float = 0.15
    dtype: torch.dtype = torch.bfloat16
    score_dtype: torch.dtype = torch.float32
    skewed: bool = False  # one head has 40 % of the budget, the others share the rest
    layers: int = 1  # the name of an op has them, the name of a shape does not

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
        """The budget of every (layer, sequence, head)."""
        budgets = self.budgets
        return (budgets if isinstance(budgets, list) else [budgets] * self.heads) * self.batch * self.layers

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
        return 2 * self.layers * self.batch * self.heads * self.length * self.row_bytes

    @property
    def score_bytes(self) -> int:
        return self.layers * self.batch * self.heads * self.length * self.score_dtype.itemsize

    @property
    def moved_bytes(self) -> int:
        """Scores once; kept rows once in and once out. Positions are left out, as they stay in L2."""
        return 2 * self.output_bytes + self.score_bytes

    def __str__(self) -> str:
        scores = "" if self.score_dtype == torch.float32 else f" {NAMES[self.score_dtype]} scores"
        sizes = f"[{self.batch}, {self.heads}, {self.length}, {self.dim}]"
        return f"{sizes} {NAMES[self.dtype]}{scores} {100 * self.retention:g}%{' skewed' * self.skewed}"

    @staticmethod
    def parse(name: str, layers: int = 1) -> Shape | None:
        """The shape of this name; None where it is one of another kind, such as of `soft_topk`."""
        pattern = r"\[(\d+), (\d+), (\d+), (\d+)\] (\w+)(?: (\w+) scores)? ([\d.e-]+)%( skewed)?"
        found = re.fullmatch(pattern, name)
        if found is None or found[5] not in DTYPES:
            return None
        batch, heads, length, dim = map(int, found.groups()[:4])
        dtype, scores = DTYPES[found[5]], DTYPES[found[6] or "fp32"]
        return Shape(length, heads, batch, dim, float(found[7]) / 100, dtype, scores, bool(found[8]), layers)
