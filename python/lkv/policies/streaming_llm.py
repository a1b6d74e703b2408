"""StreamingLLM (arXiv 2309.17453): the first tokens, which soak up attention, and the most recent ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lkv.policies.protocol import Observation
from lkv.policies.uniform import uniform_budgets


@dataclass(frozen=True)
class StreamingLLM:
    """The first `sink` tokens and the last ones, the same for all heads; nothing is looked at.

    Positions are not renumbered inside the cache: keys keep the rotation of their place in the text.
    """

    sink: int = 4

    needs: ClassVar[frozenset[str]] = frozenset()
    scope = "layer"
    window = 0

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"lkv.StreamingLLM: expected sink >= 0, got {self.sink}")

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`: the later the higher. Ranks of rows are exact in float32 up to 2^24."""
        return observation.ranks().float()

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        return uniform_budgets(lengths, total)
