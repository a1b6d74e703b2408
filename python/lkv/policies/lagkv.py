"""LagKV (arXiv 2504.04704): a row is worth how far it stands out from those of the next piece of text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class LagKV(Scorer):
    """Rows behind the sink are cut into pieces; each is scored by the minima and maxima of the piece behind it.

    For keys and for values: `softmax(std((x - min) / (max - min)))` over the rows of a piece, where minimum and maximum
    are of every number of a row over the next piece; the mean of both. The score is the rank of a row in its piece, so
    that all pieces keep alike, or with `cross` the mean itself. The last two pieces' worth that has no successor stays
    first; a text of less than two pieces keeps its last rows. All is float32. A number of no spread in the next piece
    counts as 0, where the authors divide by 0.

    Attributes:
        sink: first rows that stay.
        lag: rows of a piece.
        cross: compare rows of different pieces by their scores; for competing heads.
    """

    sink: int = 4
    lag: int = 128
    cross: bool = False

    window = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 1:
            raise ValueError(f"lkv.LagKV: expected lag >= 1, got {self.lag}")

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]` in [0, 1]."""
        ranks = observation.ranks() - self.sink
        behind = observation.lengths - self.sink
        pieces = max(observation.keys.shape[2] - self.sink, 0) // self.lag
        short = (behind < 2 * self.lag)[..., None]
        recent = ranks / behind.clamp(min=1)[..., None]
        scores = torch.where(short & (ranks >= 0), recent, 1.0)
        if pieces >= 2:
            inside = self._inside(observation, pieces).flatten(2)
            scored = (ranks >= 0) & (ranks < ((behind // self.lag - 1) * self.lag)[..., None]) & ~short
            at = ranks.clamp(0, inside.shape[2] - 1).expand_as(scores)
            scores = torch.where(scored, inside.gather(2, at), scores)
        return scores

    def _inside(self, observation: Observation, pieces: int) -> Tensor:
        """`[B, H, pieces - 1, lag]`: scores of the rows of every piece that has a successor."""
        first = observation.starts[..., None] + self.sink
        count = pieces * self.lag
        at = first + torch.arange(count, device=first.device)
        at = at.clamp(max=observation.keys.shape[2] - 1)
        score = torch.zeros(*at.shape[:2], pieces - 1, self.lag, device=at.device)
        for head in range(at.shape[1]):  # one at a time: in float32 all would be twice the layer's rows
            for rows in (observation.keys[:, head], observation.values[:, head]):
                index = at[:, head, :, None].expand(-1, -1, rows.shape[-1])
                parts = rows.gather(1, index).float().unflatten(1, (pieces, self.lag))
                low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
                spread = high - low
                relative = (parts[:, :-1] - low) / spread.masked_fill(spread == 0, torch.inf)
                score[:, head] += relative.std(-1).softmax(-1) / 2
        if self.cross:
            return score
        return score.argsort(dim=-1, stable=True).argsort(dim=-1) / self.lag
