"""SAGE-KV (arXiv 2503.08879): after the prompt, its last token chooses once what the answer may look at.

Re-implemented from the paper: there is no authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lkv.policies.attention import attention_weights
from lkv.policies.base import Scorer, ranks_by_score
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class SAGEKV(Scorer):
    """Of B rows a quarter are the first ones, a quarter the last ones, and half are chosen by the last query.

    In the paper every query head chooses B / 2G rows of its own, and attends to no others. Here rows are stored once
    and all query heads of a group attend to all of them. Repeated KV heads would give each query head its own rows, but
    also its own copy of the two ends: (G + 1) / 2 times the rows that the paper counts. So there is no exact variant,
    and what the heads choose is made one choice:

    - "union": the best rows of every query head, as many of each as make B / 2 together. Without an overlap these are
      exactly the B / 2G of the paper; where heads agree, the rows that are saved go to their next best.
    - "max", "sum": the largest attention, or the sum, over the query heads.

    Nothing is pooled. No row is chosen again later: with `lkv.compress` or a prompt alone, as in the paper.

    Attributes:
        group: "union", "max" or "sum".
        ends: the share of a budget at each of the two ends.
    """

    group: str = "union"
    ends: float = 0.25

    needs = frozenset({"queries"})
    sink = 0
    window = 1  # the token whose query chooses

    def __post_init__(self) -> None:
        if self.group not in ("union", "max", "sum"):
            raise ValueError(f"lkv.SAGEKV: expected group 'union', 'max' or 'sum', got {self.group!r}")
        if not 0 <= self.ends <= 0.5:
            raise ValueError(f"lkv.SAGEKV: expected ends in [0, 0.5], got {self.ends}")

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`; of "union" attention, too: its choice is made when the budget is known."""
        last = observation.last_queries(1)
        heads = range(observation.keys.shape[1])
        weights = [attention_weights(last, head)[:, :, 0] for head in heads]
        return torch.stack([w.sum(1) if self.group == "sum" else w.amax(1) for w in weights], 1)

    def refine(self, layer: int, observation: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """The ends first; between them the rows by their rank or their score."""
        ranks, lengths = observation.ranks(), observation.lengths
        end = (budgets.clamp(max=lengths) * self.ends).long()[..., None]
        between = (ranks >= end) & (ranks < lengths[..., None] - end)
        if self.group == "union":
            last = observation.last_queries(1)
            for head in range(scores.shape[1]):
                weights = attention_weights(last, head)[:, :, 0]
                rank = ranks_by_score(weights, between[:, head, None].expand_as(weights))
                scores[:, head] = -rank.amin(1).float()
        return scores.masked_fill(observation.valid() & ~between, torch.inf)
