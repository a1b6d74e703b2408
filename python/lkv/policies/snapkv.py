"""SnapKV (arXiv 2404.14469): what the last tokens of the prompt attend to is what the answer will need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lkv.policies.attention import evictable, grouped, mean_attention, pooled
from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention of the last `window` queries, averaged, pooled along the tokens, averaged over a head's group.

    Softmax in float32 over all rows that a query sees; mean over the window's queries; pooling over the rows before
    the window, beyond whose ends lie zeros, as in the authors' code; mean over the query heads of a KV head. The window
    itself is protected. In that order: with "max", pooling and the mean over the group do not commute. All heads get
    the same budget.

    Defaults are those of the authors' code (window 32, average of 5). kvpress has 64 and an average of 5; the paper's
    tables use 32 and a maximum of 7. Ada-KV's authors average over the group before they pool; LAVa's take the maximum.

    Attributes:
        window: queries that score, and rows that are kept whatever they score.
        kernel_size: odd width of the pooling; 1 for none.
        pooling: "avg" or "max".
        sink: first rows that are kept whatever they score.
        group: "mean" or "max" over the query heads of a KV head.
        group_first: whether the group is reduced before the pooling.
    """

    window: int = 32
    kernel_size: int = 5
    pooling: str = "avg"
    sink: int = 0
    group: str = "mean"
    group_first: bool = False

    needs = frozenset({"queries"})
    nonnegative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                "lkv.SnapKV: expected window >= 1 and an odd kernel_size >= 1, "
                f"got {self.window} and {self.kernel_size}"
            )
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"lkv.SnapKV: expected pooling 'avg' or 'max', got {self.pooling!r}")
        if self.group not in ("mean", "max"):
            raise ValueError(f"lkv.SnapKV: expected group 'mean' or 'max', got {self.group!r}")

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`; 0 outside the valid rows and in the window."""
        before = evictable(observation, self.window)
        scores = torch.zeros(observation.keys.shape[:3], device=observation.keys.device)
        for head in range(scores.shape[1]):  # one at a time: the weights of all would outgrow the cache
            weights = mean_attention(observation, head) * before[:, head, None]
            if self.group_first:
                weights = grouped(weights, self.group)[:, None]
            weights = pooled(weights, self.kernel_size, self.pooling)
            scores[:, head] = grouped(weights, self.group) * before[:, head]
        return scores
