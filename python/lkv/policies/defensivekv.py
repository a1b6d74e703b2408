"""DefensiveKV (ICLR 2026): the worst that any query of the window says of a row, not what they say on average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lkv.policies.across import AcrossLayers
from lkv.policies.adakv import AdaKV
from lkv.policies.attention import attention_weights, evictable
from lkv.policies.base import Scorer, ranks_by_score
from lkv.policies.criticalkv import projected_norms
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class DefensiveScore(Scorer):
    """The largest attention of any query and query head, no less than the mean of these, times a norm of the value.

    After the authors' code, in its order: the attention of each query to the rows before the window is pooled by an
    average of 5 and brought back to its sum; the maximum over group and window; at least its mean over the rows; times
    the L1 norm of the projected value, as a share of that of all heads at the position. Rows that make up the first 90
    % of the mean attention come first, as many of a head as its mean budget has beside the window. Of the 90 % the
    authors take off the attention to the last rows before the window, as many as it has: their comment means the
    window's own. They average that over a batch, here it is of each sequence.

    Attributes:
        sure: rows that come first have a score of inf. False: that of the best row of the layer, as in the authors'
            code, which is the same where the heads of a layer compete. Where layers do, it decides among them.
    """

    window: int = 32
    kernel_size: int = 5
    sink: int = 0
    sure: bool = True

    needs = frozenset({"queries", "output_projection", "budget"})
    nonnegative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                "lkv.DefensiveScore: expected window >= 1 and an odd kernel_size >= 1, "
                f"got {self.window} and {self.kernel_size}"
            )

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`; inf or the largest where rows come first, 0 outside the valid rows and in the window."""
        before = evictable(observation, self.window)
        count = before.sum(-1).clamp(min=1)
        ranks = observation.ranks()
        near = before & (ranks >= (observation.lengths - 2 * self.window)[..., None])
        mask = observation.part("query_mask")
        scores, mean = (torch.zeros(before.shape, device=before.device) for _ in range(2))
        bias = torch.zeros(before.shape[:2], device=before.device)
        for head in range(before.shape[1]):
            weights = attention_weights(observation, head) * before[:, head, None, None]
            queries = mask.sum(1).clamp(min=1) * weights.shape[1]
            mean[:, head] = weights.sum((1, 2)) / queries[:, None]
            bias[:, head] = (weights * near[:, head, None, None]).sum((1, 2, 3)) / queries
            flat = weights.flatten(1, 2)
            pooled = F.avg_pool1d(flat, self.kernel_size, stride=1, padding=self.kernel_size // 2)
            pooled = pooled * before[:, head, None]
            tiny = torch.finfo(torch.float32).tiny
            pooled = pooled / pooled.sum(-1, keepdim=True).clamp(min=tiny) * flat.sum(-1, keepdim=True)
            largest = pooled.amax(1)
            scores[:, head] = largest.maximum((largest.sum(-1) / count[:, head])[:, None])
        norms = projected_norms(observation)
        scores = scores * norms / norms.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        first = self._first(observation, mean, before, bias.mean(1))
        scores = scores.masked_fill(~before, 0)
        if self.sure:
            return scores.masked_fill(first, torch.inf)
        return torch.where(first, scores.amax((1, 2), keepdim=True), scores)

    def _first(self, observation: Observation, mean: Tensor, before: Tensor, bias: Tensor) -> Tensor:
        """bool `[B, H, L]`: the best rows by mean attention whose sum stays below the threshold."""
        ranks = ranks_by_score(mean, before)
        share = mean / mean.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        order = ranks.argsort(dim=-1)
        reached = share.gather(-1, order).cumsum(-1) >= (0.9 - bias)[:, None, None]
        most = (observation.part("budget").to(bias.device) - self.window).clamp(min=0)[:, None]
        # Where rounding keeps a sum below the threshold, argmax finds none, as with the authors.
        count = reached.byte().argmax(-1).minimum(most)
        return before & (ranks < count[..., None])


def layer_defensive_kv() -> AcrossLayers:
    """The layer variant, as published: the heads of all layers compete.

    The authors hold all layers until the last one has come, and name a cascade as the remedy, which this is. The rows
    of their window have the score of the best row of their layer; here they stay.
    """
    return AcrossLayers(DefensiveScore(sure=False))


def defensive_kv() -> AdaKV:
    """As published: the heads of a layer compete, and nothing is sure."""
    return AdaKV(DefensiveScore(), alpha=0.0)
