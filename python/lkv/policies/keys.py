"""Scores of rows by their keys alone: no query, no attention, nothing to observe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class KNorm(Scorer):
    """Keys of a small norm are attended to the most: `-|k|` (arXiv 2406.11430), of keys after RoPE.

    The authors leave out the first two layers; kvpress and this do not. Norms are float32.

    Attributes:
        sink, window: rows kept at both ends; none in the paper.
    """

    sink: int = 0
    window: int = 0

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`."""
        return -torch.linalg.vector_norm(observation.keys, dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Keys unlike the others carry what the others do not: minus the cosine to the mean key (arXiv 2504.15364).

    The mean is of all valid keys of the head, each of norm 1. The paper evicts after every block of a prompt, which is
    a prompt fed in pieces with `chunks="each"`; in one piece it is what kvpress has without its BlockPress.

    Attributes:
        sink, window: rows kept at both ends; none in the paper.
    """

    sink: int = 0
    window: int = 0

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]` in [-1, 1]; 0 outside the valid rows."""
        valid = observation.valid()
        scores = valid.new_zeros(valid.shape, dtype=torch.float32)
        for head in range(scores.shape[1]):  # one at a time: in float32 all would be twice the layer's keys
            here = valid[:, head, :, None]
            keys = F.normalize(observation.keys[:, head].float().masked_fill(~here, 0), dim=-1)
            anchor = F.normalize(keys.sum(1, keepdim=True), dim=-1)
            scores[:, head] = -(keys * anchor).sum(-1)
        return scores
