"""Methods with a number for every head of a model, found once and kept in a file: HeadKV and DuoAttention."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

import lkv_ext
from lkv.policies.base import LayerWrapper, Scorer
from lkv.policies.protocol import Observation, Policy
from lkv.policies.snapkv import SnapKV

Table = tuple[tuple[float, ...], ...]  # [N][H]


def load_table(path: str | PathLike[str], heads: int | None = None) -> Table:
    """The numbers of all heads, `[N][H]`, from a file: lines of numbers, or JSON.

    JSON is a list of lists, or the form of HeadKV and Retrieval Head, `{"layer-head": [numbers]}`, of which means are
    taken.

    Args:
        heads: KV heads of a layer; where the file has query heads, the mean of each group. Default: as in the file.

    Raises:
        ValueError: for a file of another form, and numbers that are no table.
    """
    text = Path(path).read_text()
    try:
        if text.lstrip()[:1] in ("{", "["):
            rows = _of_json(json.loads(text))
        else:
            rows = [[float(x) for x in line.split()] for line in text.splitlines() if line.strip()]
        table = torch.tensor(rows, dtype=torch.float64, device="cpu")
        if table.dim() != 2 or not table.numel() or not table.isfinite().all():
            raise ValueError(f"got {list(table.shape)}")
        if heads is not None:
            table = table.unflatten(1, (heads, -1)).mean(2)
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"lkv.policies: expected a table [layers, heads] of numbers in {path}, {error}") from None
    return tuple(map(tuple, table.tolist()))


def _of_json(found: object) -> list[list[float]]:
    if not isinstance(found, dict):
        return found  # type: ignore[return-value]  # checked as a tensor
    places = {tuple(map(int, name.split("-"))): sum(x) / len(x) for name, x in found.items()}
    layers, heads = (1 + max(at[i] for at in places) for i in (0, 1))
    return [[places[n, h] for h in range(heads)] for n in range(layers)]


@dataclass(frozen=True)
class HeadKV(LayerWrapper):
    """HeadKV (arXiv 2410.19258): a part of the total is shared out by a table of heads, the same for every text.

    With `base` rows beside the window on average, every head has `base - base // beta` and its share of the pool of
    `base // beta` times the heads of all layers, by `score ** temperature`. The authors' table and caches are of query
    heads, G times the memory; here it is of KV heads (`load_table(path, heads=H)` averages). Their total is
    approximate, ours exact.

    Attributes:
        table: `[N][H]`, not negative, of the layers that are evicted.
        scorer: whose scores choose; its window is protected.
        beta: at least 1: how much is in the pool.
    """

    scorer: Policy = field(default_factory=lambda: SnapKV(window=32, kernel_size=7, pooling="max"))
    table: Table = ()
    beta: float = 1.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_table(self.table, "HeadKV")
        if self.beta < 1:
            raise ValueError(f"lkv.HeadKV: expected beta >= 1, got {self.beta}")

    @property
    def layers(self) -> int:
        return len(self.table)

    def ahead(self, layer: int, rows: Tensor, lengths: Tensor) -> Tensor:
        """int64 `[B, H]` of one layer; see `Ahead`."""
        pairs = zip(rows.tolist(), lengths.tolist(), strict=True)
        return torch.stack([self.budget_table(*pair)[layer] for pair in pairs])

    def budget_table(self, rows: int, length: int) -> Tensor:
        """int64 `[N, H]`: rows of every head, `rows` on average."""
        scores = torch.tensor(self.table, dtype=torch.float64, device="cpu") ** self.temperature
        sure = min(rows, self.sink + self.window)
        base, heads = rows - sure, scores.numel()
        pool = int(base // self.beta)
        shares = scores / scores.sum().clamp(min=1e-300) * pool * heads + (base - pool)
        return sure + lkv_ext.budgets_from_shares(shares, total=base * heads, lengths=length - sure)


@dataclass(frozen=True)
class DuoAttention(Scorer):
    """DuoAttention (arXiv 2410.10819): retrieval heads keep everything, streaming heads the first and the last rows.

    The published tables say how much a head is a retrieval head. Here as many of the best as the total pays for keep
    everything, and one a part of the rest; streaming heads keep `sink + recent`, or the mean where that is less.

    Attributes:
        table: `[N][H]` of KV heads, of the layers that are evicted.
        sink, recent: rows of a streaming head.
    """

    table: Table = ()
    sink: int = 64
    recent: int = 256

    window = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_table(self.table, "DuoAttention")
        if self.recent < 0:
            raise ValueError(f"lkv.DuoAttention: expected recent >= 0, got {self.recent}")

    @property
    def layers(self) -> int:
        return len(self.table)

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`: the later the higher."""
        return observation.ranks().float()

    def ahead(self, layer: int, rows: Tensor, lengths: Tensor) -> Tensor:
        """int64 `[B, H]` of one layer; see `Ahead`."""
        pairs = zip(rows.tolist(), lengths.tolist(), strict=True)
        return torch.stack([self.budget_table(*pair)[layer] for pair in pairs])

    def budget_table(self, rows: int, length: int) -> Tensor:
        """int64 `[N, H]`: rows of every head, `rows` on average."""
        scores = torch.tensor(self.table, dtype=torch.float64, device="cpu")
        streaming = min(self.sink + self.recent, rows, length)
        budgets = torch.full((scores.numel(),), streaming, device="cpu")
        left = (rows - streaming) * scores.numel()
        for head in scores.flatten().argsort(descending=True, stable=True).tolist():
            more = min(left, length - streaming)
            budgets[head] += more
            left -= more
        return budgets.view(scores.shape)


def _check_table(table: Table, name: str) -> None:
    widths = {len(row) for row in table}
    if len(widths) != 1 or not min(widths) or not all(0 <= x < math.inf for row in table for x in row):
        raise ValueError(
            f"lkv.{name}: expected a table [layers][heads] of finite numbers >= 0, got {len(table)} rows of "
            f"{sorted(widths)}: lkv.policies.tables.load_table reads a file"
        )
