"""StreamingLLM (arXiv 2309.17453): the first tokens, which soak up attention, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """The first `sink` tokens and the last ones, the same for all heads; nothing is looked at.

    Positions are not renumbered inside the cache: keys keep the rotation of their place in the text.
    """

    sink: int = 4

    window = 0

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`: the later the higher. Ranks of rows are exact in float32 up to 2^24."""
        return observation.ranks().float()
