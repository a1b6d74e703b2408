"""CriticalKV (arXiv 2502.03805): half of a budget by attention, the other half by what a row does to the output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lkv.policies.base import ScoreWrapper, ranks_by_score, refiner
from lkv.policies.protocol import Observation, Policy
from lkv.policies.snapkv import SnapKV

CHUNK = 1024  # rows whose projections are in memory at once


@dataclass(frozen=True)
class CriticalKV(ScoreWrapper):
    """The first rows of a budget are the scorer's best; the others are the best by `(score + epsilon) * |W_o v|_1`.

    The norm is of the value after the output projection of a query head, averaged over the query heads of the group.
    Budgets are made of the scorer's scores: `AdaKV(CriticalKV(SnapKV()))` is kvpress's CriticalAdaKVPress. Protected
    rows count in the first part and stay; in kvpress they are only its best, and a window longer than the first part
    may lose rows. The rows that kvpress makes sure of for heads with next to nothing are not treated apart.

    Attributes:
        scorer: a policy whose scores are not negative.
        epsilon: added to the scores.
        first: the share of a budget that is the scorer's.
    """

    scorer: Policy = field(default_factory=SnapKV)
    epsilon: float = 1e-4
    first: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not getattr(self.scorer, "nonnegative", False):
            raise ValueError(f"lkv.CriticalKV: expected a scorer whose scores are weights, got {self.scorer}")
        if not 0 <= self.first <= 1:
            raise ValueError(f"lkv.CriticalKV: expected first in [0, 1], got {self.first}")

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs | {"output_projection"}

    def refine(self, layer: int, observation: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        inner = refiner(self.scorer)
        if inner is not None:
            scores = inner.refine(layer, observation, scores, budgets)
        lengths, ranks = observation.lengths, observation.ranks()
        kept = torch.minimum(budgets, lengths)
        ends = torch.minimum(kept, torch.full_like(kept, self.sink + self.window))
        between = (ranks >= self.sink) & (ranks < (lengths - self.window)[..., None])
        sure = ((kept * self.first).long() - ends).clamp(min=0)[..., None]
        best = ranks_by_score(scores, between) < sure
        return ((scores + self.epsilon) * projected_norms(observation)).masked_fill(between & best, torch.inf)


def projected_norms(observation: Observation) -> Tensor:
    """float32 `[B, H, L]`: the L1 norm of a row's value after the output projection, mean over its query heads."""
    values, weight = observation.values, observation.part("output_projection")
    batch, heads, length, dim = values.shape
    group = weight.shape[1] // (heads * dim)
    norms = torch.zeros(batch, heads, length, device=values.device)
    for head in range(heads):
        for first in range(0, length, CHUNK):
            part = values[:, head, first : first + CHUNK]
            for query_head in range(head * group, (head + 1) * group):
                projected = part @ weight[:, query_head * dim : (query_head + 1) * dim].T
                norms[:, head, first : first + CHUNK] += projected.float().abs().sum(-1) / group
    return norms
