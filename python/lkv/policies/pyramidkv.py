"""PyramidKV (arXiv 2406.02069): the first layers keep much, the last ones little, in equal steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import lkv_ext
from lkv.policies.base import LayerWrapper
from lkv.policies.protocol import Policy
from lkv.policies.snapkv import SnapKV


def _authors() -> SnapKV:
    return SnapKV(window=8, kernel_size=7, pooling="max")


@dataclass(frozen=True)
class PyramidKV(LayerWrapper):
    """Layer l of N keeps `most - l * (most - least) / (N - 1)` rows beside the window.

    With `base` rows beside the window on average, `least = base / beta` and `most = 2 base - least`; where `most` would
    be more than there is, it is what there is and `least = 2 base - most`. A text shorter than `2 base` is cut alike in
    all layers, as in the authors' code. Their steps are whole, rounded down, so that they keep more than they say (15 %
    at 128 rows and beta 20); here the total is exact, by largest remainder. Within a layer the scorer's budgets hold.

    Attributes:
        scorer: the policy inside; its protected rows are the window.
        beta: at least 1: how steep it is; 1: not at all.
        whole: kvpress's reading: the steps are of all rows of a head, the window among them, and no layer may fall
            below it.
    """

    scorer: Policy = field(default_factory=_authors)
    beta: float = 20
    whole: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"lkv.PyramidKV: expected beta >= 1, got {self.beta}")

    def layer_rows(self, layers: int, rows: Tensor, lengths: Tensor) -> Tensor:
        """int64 `[N, B]`, of sum `layers * rows`."""
        pairs = zip(rows.tolist(), lengths.tolist(), strict=True)
        return torch.stack([self._table(layers, *pair) for pair in pairs], 1)

    def _table(self, layers: int, rows: int, length: int) -> Tensor:
        ends = self.sink + self.window
        sure = 0 if self.whole else ends
        base, there = rows - sure, max(length - ends, 0)
        least = base / self.beta
        most = 2 * base - least
        if most >= there:
            most, least = there, 2 * base - there
        steep = most >= least >= ends if self.whole else length >= 2 * base and least >= 0
        if layers == 1 or not steep:
            return torch.full((layers,), rows, device="cpu")
        shares = [most - n * (most - least) / (layers - 1) for n in range(layers)]
        return sure + lkv_ext.budgets_from_shares(shares, total=layers * base, lengths=length - sure)
