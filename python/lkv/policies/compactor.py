"""Compactor (arXiv 2507.08143): rows whose keys span what others do not, and that others near them look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lkv.policies.attention import evictable
from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class Leverage(Scorer):
    """Leverage of keys before RoPE: `x' (X'X + ridge I)^-1 x`, of centred keys, standardised over a layer.

    Exact: the matrix is D x D. The authors, and kvpress, first map keys to 48 random directions.

    Attributes:
        sink, window: rows kept at both ends, which take no part.
        ridge: kvpress's 0.01.
    """

    sink: int = 8
    window: int = 4
    ridge: float = 0.01

    needs = frozenset({"pre_rope_keys"})

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`, of mean 0 and deviation 1 over the rows of a sequence."""
        between = evictable(observation, self.window, self.sink)
        keys = observation.part("pre_rope_keys")
        scores = torch.zeros(between.shape, device=between.device)
        for head in range(scores.shape[1]):
            here = between[:, head, :, None]
            rows = keys[:, head].float().masked_fill(~here, 0)
            count = here.sum(1, keepdim=True).clamp(min=1)
            rows = (rows - rows.sum(1, keepdim=True) / count).masked_fill(~here, 0)
            square = rows.transpose(1, 2) @ rows
            square.diagonal(dim1=1, dim2=2).add_(self.ridge)
            lower = torch.linalg.cholesky_ex(square)[0]  # with the ridge it exists; a check would synchronise
            solved = torch.cholesky_solve(rows.transpose(1, 2), lower)
            scores[:, head] = (rows * solved.transpose(1, 2)).sum(-1).clamp(min=0)
        return standardised(scores, between)


@dataclass(frozen=True)
class Compactor(Leverage):
    """Leverage times `blending`, plus attention without a mask within pieces of a text, times the norm of the value.

    In pieces of 256 tokens behind the sink every query looks at all keys of its piece, logits unscaled as in kvpress;
    what a row receives, averaged over the group, times `|v|_2`, is averaged over 3 rows and standardised over a layer.
    kvpress standardises over a batch and gives weight to the padding of the last piece: it does neither.

    Attributes:
        blending: None: what is evicted of a text, as in kvpress.
        piece: tokens of a piece.
    """

    blending: float | None = None
    piece: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.piece < 1:
            raise ValueError(f"lkv.Compactor: expected piece >= 1, got {self.piece}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # depends on the settings
        return frozenset({"pre_rope_keys", "all_queries"} | ({"budget"} if self.blending is None else set()))

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`."""
        leverage, lengths = super().score(layer, observation), observation.lengths.float().mean(1)
        if self.blending is not None:
            return leverage * self.blending + self._received(observation)
        evicted = 1 - observation.part("budget").to(lengths.device) / lengths.clamp(min=1)
        return leverage * evicted[:, None, None] + self._received(observation)

    def _received(self, observation: Observation) -> Tensor:
        between = evictable(observation, self.window, self.sink)
        places, queries = observation.part("query_positions"), observation.part("queries")
        batch, heads, length, dim = observation.keys.shape
        pieces = -(-length // self.piece)
        # Behind the sink, so that pieces are the same whatever lies in front.
        at = observation.starts[:, :1] + self.sink + torch.arange(pieces * self.piece, device=places.device)
        inside = at.clamp(max=length - 1)
        there = between[:, 0].gather(1, inside) & (at < length)
        row = torch.searchsorted(places.contiguous(), observation.positions[:, 0].long().gather(1, inside)).clamp(
            max=places.shape[1] - 1
        )
        found = places.gather(1, row) == observation.positions[:, 0].long().gather(1, inside)
        there_q = there & found & observation.part("query_mask").gather(1, row)
        group, scores = queries.shape[1] // heads, torch.zeros(between.shape, device=places.device)
        for head in range(heads):
            index = inside[..., None].expand(-1, -1, dim)
            keys = observation.keys[:, head].gather(1, index).unflatten(1, (pieces, self.piece))
            seen = there.unflatten(1, (pieces, 1, self.piece))
            total = torch.zeros(at.shape, device=places.device)
            for query_head in range(head * group, (head + 1) * group):
                asked = queries[:, query_head].gather(1, row[..., None].expand(-1, -1, dim))
                logits = asked.unflatten(1, (pieces, self.piece)) @ keys.transpose(2, 3)
                weights = logits.float().masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
                weights = weights * seen * there_q.unflatten(1, (pieces, self.piece))[..., None]
                total += weights.sum(2).flatten(1) / group
            norms = torch.linalg.vector_norm(observation.values[:, head].float(), dim=-1)
            received = torch.zeros(batch, length, device=places.device).scatter_add_(1, inside, total * there)
            scores[:, head] = received * norms * between[:, head]
        scores = F.avg_pool1d(scores, 3, stride=1, padding=1)
        return standardised(scores, between)


def standardised(scores: Tensor, counted: Tensor) -> Tensor:
    """`[B, H, L]` of mean 0 and deviation 1 over the rows of a sequence that count; 0 elsewhere."""
    count = counted.flatten(1).sum(1).clamp(min=1)[:, None, None]
    mean = (scores * counted).flatten(1).sum(1)[:, None, None] / count
    centred = (scores - mean) * counted
    deviation = ((centred**2).flatten(1).sum(1)[:, None, None] / (count - 1).clamp(min=1)).sqrt()
    return centred / deviation.clamp(min=1e-6)
