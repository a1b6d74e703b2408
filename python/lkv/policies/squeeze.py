"""SqueezeAttention (arXiv 2404.04793): layers whose attention hardly changes the residual stream keep less."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import lkv_ext
from lkv.policies.base import ImportanceWrapper
from lkv.policies.protocol import Observation, Policy
from lkv.policies.streaming_llm import StreamingLLM


@dataclass(frozen=True)
class SqueezeAttention(ImportanceWrapper):
    """Layers fall into three groups by a cosine; those of the highest keep `p` of what they would, the others the rest.

    The cosine is between the residual stream before and behind the attention of a layer, averaged over the tokens of
    the prompt. Groups are those of 3-means in one dimension, found exactly over all splits of the sorted values where
    the authors start k-means at random. Of b rows on average, group 3 keeps `p b` and the others
    `(N b - n3 p b) / (N - n3)`, none more than there is; the total is exact. Any policy divides what a layer has among
    its heads and scores the rows. All layers are whole until the last one has attended.

    Attributes:
        scorer: the policy inside. The authors use a sliding window, StreamingLLM and H2O.
        p: what the layers of group 3 keep, in (0, 1]. The repository's examples have 0.08 of 0.21 and 0.25 of 0.4.
    """

    scorer: Policy = field(default_factory=StreamingLLM)
    p: float = 0.38

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"lkv.SqueezeAttention: expected p in (0, 1], got {self.p}")

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs | {"attention_cosine"}

    def importance(self, layer: int, observation: Observation, scores: Tensor) -> Tensor:
        return observation.part("attention_cosine")

    def divide(self, importance: list[float], total: int, lengths: Tensor) -> Tensor:
        layers, heads = lengths.shape
        third = least_important(importance)
        squeezed = sum(third)
        other = (layers - squeezed * self.p) / max(layers - squeezed, 1)
        shares = [self.p if low else other for low in third]
        there = lengths.sum(1)
        floor = min(heads * (self.sink + self.window), total // layers, int(there.min()))
        return lkv_ext.budgets_from_shares(shares, total=total, lengths=there, floor=floor)


def least_important(cosines: list[float]) -> list[bool]:
    """Which values are in the highest of three groups with the least sum of squares; none of fewer than 3 different."""
    order = sorted(range(len(cosines)), key=lambda n: cosines[n])
    x = torch.tensor([cosines[n] for n in order], dtype=torch.float64, device="cpu")
    if len(x.unique()) < 3:
        return [False] * len(x)
    sums, squares = (torch.cat([x.new_zeros(1), y.cumsum(0)]) for y in (x, x * x))

    def spread(first: int, end: int) -> float:
        """Squared distances of x[first:end] to their mean."""
        return float(squares[end] - squares[first] - (sums[end] - sums[first]) ** 2 / (end - first))

    splits = [(i, j) for i in range(1, len(x) - 1) for j in range(i + 1, len(x))]
    _, last = min(splits, key=lambda at: spread(0, at[0]) + spread(at[0], at[1]) + spread(at[1], len(x)))
    high = set(order[last:])
    return [n in high for n in range(len(x))]
