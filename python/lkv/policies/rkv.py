"""R-KV (arXiv 2505.24133): while a model reasons, rows that say what others say go first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lkv.policies.attention import attention_logits, evictable, pooled
from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation

BLOCK = 256  # rows whose similarity to all others is in memory at once


@dataclass(frozen=True)
class RKV(Scorer):
    """`mix * attention - (1 - mix) * redundancy`, after the authors' code.

    Attention: the largest logit of the query heads of a group, softmax over the rows before the window, mean over the
    last `window` queries, maximum of `kernel_size` rows. Redundancy: the softmax over all rows of the mean cosine of a
    row's key to the keys of all others. For each of these, the last row that is similar to it (a cosine above
    `threshold`) is spared: it counts as 0 there; where none is similar the first row is, as in the authors' code. That
    every row is compared with every other is the definition: it is done in blocks.

    The authors evict every 128 tokens of an answer: `cap=budget + 128, interval=128`.

    Attributes:
        window: last rows that stay, whose queries score.
        sink: first rows that stay; none in the paper.
    """

    window: int = 8
    kernel_size: int = 7
    mix: float = 0.07
    threshold: float = 0.5
    sink: int = 0

    needs = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"lkv.RKV: expected window >= 1 and an odd kernel_size >= 1, got {self.window} and {self.kernel_size}"
            )
        if not 0 <= self.mix <= 1:
            raise ValueError(f"lkv.RKV: expected mix in [0, 1], got {self.mix}")

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`."""
        observation, before = observation.last_queries(self.window), evictable(observation, self.window)
        count = observation.part("query_mask").sum(1).clamp(min=1)[:, None]
        scores = torch.zeros(before.shape, device=before.device)
        for head in range(before.shape[1]):
            logits, visible = attention_logits(observation, head)
            there = visible & before[:, head, None]
            weights = logits.amax(1).masked_fill(~there, torch.finfo(torch.float32).min).softmax(-1) * there
            attention = pooled(weights.sum(1, keepdim=True) / count[..., None], self.kernel_size, "max")[:, 0]
            scores[:, head] = self.mix * attention - (1 - self.mix) * self.redundancy(observation, head)
        return scores

    def redundancy(self, observation: Observation, head: int) -> Tensor:
        """float32 `[B, L]` of one head: 0 outside the valid rows, of sum 1."""
        valid = observation.valid()[:, head]
        keys = F.normalize(observation.keys[:, head].float().masked_fill(~valid[..., None], 0), dim=-1)
        places, sums = torch.arange(keys.shape[1], device=keys.device), torch.zeros(valid.shape, device=keys.device)
        for first in range(0, keys.shape[1], BLOCK):
            cosines = keys[:, first : first + BLOCK] @ keys.transpose(1, 2)
            cosines.diagonal(first, 1, 2).zero_()
            similar = torch.where(cosines > self.threshold, places, observation.starts[:, head, None, None])
            sums += cosines.scatter_(2, similar.amax(-1, keepdim=True), 0).sum(1)
        mean = sums / valid.sum(-1, keepdim=True).clamp(min=1)
        return mean.masked_fill(~valid, torch.finfo(torch.float32).min).softmax(-1) * valid
