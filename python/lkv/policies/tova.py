"""TOVA (arXiv 2401.06104): what the last token of all does not look at goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lkv.policies.attention import mean_attention
from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class TOVA(Scorer):
    """Attention of the last query, averaged over all heads of the layer: all heads keep the same tokens.

    While decoding, `cap=` with `interval=1` drops one token a step, as in the paper; an interval drops several at once.
    Where heads hold different tokens, after another policy, a head that has lost one counts as paying nothing to it.

    Attributes:
        sink: first rows that stay; none in the paper.
        window: last rows that stay. 1: the last token, as in kvpress; the authors' code may drop it, 0.
    """

    sink: int = 0
    window: int = 1

    needs = frozenset({"queries"})
    nonnegative = True

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`."""
        last = observation.last_queries(1)
        heads = range(observation.keys.shape[1])
        weights = torch.stack([mean_attention(last, head).sum(1) for head in heads], 1)
        return shared_by_token(observation, weights) / observation.part("queries").shape[1]


def shared_by_token(observation: Observation, weights: Tensor) -> Tensor:
    """`[B, H, L]`, summed over the heads that hold the same token; outside the valid rows 0."""
    places = observation.positions
    if places.stride(1) == 0:  # whole rows: the same tokens in all heads
        return weights.sum(1, keepdim=True).expand_as(weights)
    valid = observation.valid()
    beyond = torch.iinfo(torch.int64).max
    # Rows are in ascending position; what is not valid lies behind.
    at = places.long().masked_fill(~valid, beyond)
    total = torch.zeros_like(weights)
    for head in range(weights.shape[1]):
        row = at[:, head, None].expand_as(at).contiguous()
        found = torch.searchsorted(row, at.contiguous()).clamp(max=at.shape[2] - 1)
        same = row.gather(2, found) == at
        total += weights[:, head, None].expand_as(weights).gather(2, found) * same
    return total.masked_fill(~valid, 0)
