"""CAKE (ICLR 2025): layers whose attention is spread and changes keep more; within a layer all heads keep the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lkv.policies.attention import attention_weights, evictable, grouped, pooled
from lkv.policies.base import ImportanceWrapper, Scorer, refiner
from lkv.policies.protocol import Observation, Policy


@dataclass(frozen=True)
class CAKEScore(Scorer):
    """Mean plus `gamma` times the variance of the attention of the last queries, pooled by an average of 5.

    In that order, then the mean over the group. The variance is the unbiased one, over the queries of the window.
    """

    window: int = 32
    gamma: float = 200.0
    kernel_size: int = 5
    sink: int = 0

    needs = frozenset({"queries"})
    nonnegative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                "lkv.CAKEScore: expected window >= 2 and an odd kernel_size >= 1, "
                f"got {self.window} and {self.kernel_size}"
            )

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`; 0 outside the valid rows and in the window."""
        before = evictable(observation, self.window)
        scores = torch.zeros(observation.keys.shape[:3], device=observation.keys.device)
        for head in range(scores.shape[1]):
            mean, variance = moments(attention_weights(observation, head), observation.part("query_mask"))
            weights = (mean + self.gamma * variance) * before[:, head, None]
            scores[:, head] = grouped(pooled(weights, self.kernel_size, "avg"), "mean") * before[:, head]
        return scores


@dataclass(frozen=True)
class CAKE(ImportanceWrapper):
    """Layer l gets its share of `dispersion ** (1 / tau1) * shift ** (1 / tau2)`.

    The dispersion is the entropy of the attention of the last queries to the rows before the window, summed over
    query heads and queries; the shift the sum over heads and rows of its variance over the queries. Shares are made
    whole as in the authors' code, then what is left over or too much is spread evenly. Earlier layers shrink as later
    ones arrive (scope "cascade"), as theirs do. Their choice of `tau1` and `tau2`
    for models and budgets is in their repository (Llama-3.1-8B, 1024 rows: 1.6 and 0.4).

    Attributes:
        scorer: scores; its window is that of the layers' attention.
    """

    scorer: Policy = field(default_factory=CAKEScore)
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau1 <= 0 or self.tau2 <= 0:
            raise ValueError(f"lkv.CAKE: expected tau1 and tau2 above 0, got {self.tau1} and {self.tau2}")
        if self.window < 2:
            raise ValueError(f"lkv.CAKE: expected a scorer of a window of 2 or more queries, got {self.window}")

    @property
    def scope(self) -> str:
        return "model" if refiner(self.scorer) is not None else "cascade"

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs | {"queries"}

    def importance(self, layer: int, observation: Observation, scores: Tensor) -> Tensor:
        observation, before = observation.last_queries(self.window), evictable(observation, self.window)
        mask = observation.part("query_mask")
        dispersion = scores.new_zeros(len(scores), dtype=torch.float32)
        shift = torch.zeros_like(dispersion)
        for head in range(scores.shape[1]):
            weights = attention_weights(observation, head) * before[:, head, None, None]
            dispersion += torch.special.entr(weights).sum((1, 2, 3))
            shift += moments(weights, mask)[1].sum((1, 2))
        return dispersion ** (1 / self.tau1) * shift ** (1 / self.tau2)

    def divide(self, importance: list[float], total: int, lengths: Tensor) -> Tensor:
        heads, ends = lengths.shape[1], self.sink + self.window
        sure = lengths.clamp(max=ends)
        there = (lengths - sure).sum(1)
        rest = total - int(sure.sum())
        if rest <= 0:
            even, left = divmod(total, len(sure))
            return torch.tensor([even + (n < left) for n in range(len(sure))], device="cpu")
        each, left = divmod(rest, heads)  # the authors count rows of a head
        rows = [heads * n for n in adjusted(importance, each, [int(n) // heads for n in there])]
        for n, most in enumerate(there.tolist()):  # and no remainders of heads
            more = min(left + each * heads - sum(rows), most - rows[n])
            rows[n] += max(more, 0)
        return sure.sum(1) + torch.tensor(rows, device="cpu")


def moments(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the queries that are there, `[B, G, L]` each, of `[B, G, w, L]`."""
    there = mask[:, None, :, None]
    count = mask.sum(1)[:, None, None]
    mean = (weights * there).sum(2) / count.clamp(min=1)
    squares = ((weights - mean[:, :, None]) ** 2 * there).sum(2)
    return mean, squares / (count - 1).clamp(min=1)


def adjusted(importance: list[float], total: int, caps: list[int]) -> list[int]:
    """Shares of a total, whole numbers within their caps; what is over or left is spread evenly, first ones first.

    For as long as there is space, of which the authors' code may leave some after its last step.
    """
    whole = sum(importance) or 1.0
    shares = [int(x / whole * total) for x in importance]
    rows = list(map(min, shares, caps))
    rows = _spread(rows, sum(shares) - sum(rows), caps)
    return _spread(rows, total - sum(rows), caps)


def _spread(rows: list[int], more: int, caps: list[int]) -> list[int]:
    rows = list(rows)
    while more > 0 and (free := [n for n, cap in enumerate(caps) if rows[n] < cap]):
        even, left = divmod(more, len(free))
        for i, n in enumerate(free):
            new = min(rows[n] + even + (i < left), caps[n])
            more -= new - rows[n]
            rows[n] = new
    return rows
