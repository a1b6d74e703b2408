"""SnapKV (arXiv 2404.14469): what the last tokens of the prompt attend to is what the answer will need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lkv.policies.attention import attention_weights
from lkv.policies.protocol import Observation
from lkv.policies.uniform import uniform_budgets


@dataclass(frozen=True)
class SnapKV:
    """Attention of the last `window` queries, averaged, pooled along the tokens, averaged over a head's group.

    Softmax in float32 over all rows that a query sees; mean over the window's queries; pooling over the rows before
    the window, beyond whose ends lie zeros, as in the authors' code; mean over the query heads of a KV head. The window
    itself is protected. In that order: with "max", pooling and the mean over the group do not commute. All heads get
    the same budget.

    Defaults are those of the authors' code (window 32, average of 5). kvpress has 64 and an average of 5; the paper's
    tables use 32 and a maximum of 7.

    Attributes:
        window: queries that score, and rows that are kept whatever they score.
        kernel_size: odd width of the pooling; 1 for none.
        pooling: "avg" or "max".
        sink: first rows that are kept whatever they score.
    """

    window: int = 32
    kernel_size: int = 5
    pooling: str = "avg"
    sink: int = 0

    needs = frozenset({"queries"})
    scope = "layer"

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"lkv.SnapKV: expected sink >= 0, got {self.sink}")
        if self.window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                "lkv.SnapKV: expected window >= 1 and an odd kernel_size >= 1, "
                f"got {self.window} and {self.kernel_size}"
            )
        if self.pooling not in ("avg", "max"):
            raise ValueError(f"lkv.SnapKV: expected pooling 'avg' or 'max', got {self.pooling!r}")

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`; 0 outside the valid rows and in the window."""
        before = observation.valid() & (observation.ranks() < (observation.lengths - self.window)[..., None])
        scores = torch.zeros(observation.keys.shape[:3], device=observation.keys.device)
        for head in range(scores.shape[1]):  # one at a time: the weights of all would outgrow the cache
            pooled = self._pool(window_attention(observation, head) * before[:, head, None])
            scores[:, head] = pooled.mean(1) * before[:, head]
        return scores

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        return uniform_budgets(lengths, total)

    def _pool(self, weights: Tensor) -> Tensor:
        if self.kernel_size == 1:
            return weights
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d  # no weight is negative: zeros lose every max
        return pool(weights, self.kernel_size, stride=1, padding=self.kernel_size // 2)


def window_attention(observation: Observation, head: int) -> Tensor:
    """float32 `[B, G, L]`: the mean attention that the last queries pay to the rows of one KV head.

    Queries that are not there do not count; a sequence without any real query has zeros.
    """
    count = observation.part("query_mask").sum(1).clamp(min=1)
    return attention_weights(observation, head).sum(2) / count[:, None, None]
