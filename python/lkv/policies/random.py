"""Rows drawn at random: the floor under every method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class Random(Scorer):
    """Every head draws its own rows, the same ones for the same positions.

    Attributes:
        seed: of the draw.
        sink, window: rows kept at both ends whatever is drawn.
    """

    seed: int = 0
    sink: int = 4
    window: int = 32

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]` in [0, 1), a hash of layer, head and position."""
        heads = torch.arange(observation.keys.shape[1], device=observation.keys.device)[:, None]
        state = observation.positions.long() * 0x9E3779B1 + (self.seed * 4096 + layer) * 256 + heads
        for multiplier in (0x7FEB352D, 0x846CA68B):  # two rounds of a 32-bit integer hash
            state = ((state ^ (state >> 16)) * multiplier) & 0xFFFFFFFF
        return (state ^ (state >> 16)).float() / 2**32
