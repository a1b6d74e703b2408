"""H2O (arXiv 2306.14048): heavy hitters, the rows that have received the most attention so far, and recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lkv.policies.attention import attention_weights, blocks, grouped
from lkv.policies.base import Scorer
from lkv.policies.protocol import Carried, Observation


@dataclass(frozen=True)
class H2O(Scorer):
    """Attention that a row has received from all queries so far, summed, averaged over a head's group.

    Half of a budget are the last rows, half the heavy hitters, as the authors set it. Their code evicts at every step
    of a prompt, too; here a prompt attends in full, as in all ports. Queries are looked at in blocks: no L x L matrix
    is made, but the work is that of the prompt's attention once more. Sums go on from eviction to eviction: those of a
    row move with it, and what came since is added, so that with `cap=` and `interval=1` decoding is the paper's.

    Attributes:
        recent: the share of a budget that the last rows are.
        average: divide by the number of queries that see a row: kvpress's ObservedAttention, with `recent=0`.
        sink, window: rows kept at both ends beside; none in the paper.
    """

    recent: float = 0.5
    average: bool = False
    sink: int = 0
    window: int = 0

    needs = frozenset({"all_queries"})
    nonnegative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 1:
            raise ValueError(f"lkv.H2O: expected recent in [0, 1], got {self.recent}")

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`; 0 outside the valid rows."""
        carried = observation.carried or self.accumulate(layer, observation, None)
        if carried.rows is None:
            raise ValueError("lkv.H2O: expected an observation that carries the sums of rows, got one without")
        received, queries = carried.rows.unbind(-1)
        return received / queries.clamp(min=1) if self.average else received

    def accumulate(self, layer: int, observation: Observation, before: Carried | None) -> Carried:
        """Of every row, the attention that it has received, and the number of queries that saw it."""
        sums = torch.zeros(*observation.keys.shape[:3], 2, device=observation.keys.device)
        if before is None or observation.queries is not None:
            for some in blocks(observation):
                for head in range(sums.shape[1]):
                    sums[:, head, :, 0] += grouped(attention_weights(some, head).sum(2), "mean")
            sums[..., 1] = self._seen(observation)
        return Carried(sums if before is None or before.rows is None else sums + before.rows)

    def refine(self, layer: int, observation: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """The last rows first."""
        lengths = observation.lengths
        last = lengths - (budgets.clamp(max=lengths) * self.recent).long()
        return scores.masked_fill(observation.valid() & (observation.ranks() >= last[..., None]), torch.inf)

    def _seen(self, observation: Observation) -> Tensor:
        """Queries that see each row: float32 `[B, H, L]`."""
        places, mask = observation.part("query_positions"), observation.part("query_mask")
        at = places.masked_fill(~mask, -1).sort(1).values.contiguous()
        rows = observation.positions.long().flatten(1).contiguous()
        before = torch.searchsorted(at, rows).view(observation.positions.shape)
        return (at.shape[1] - before).float()
