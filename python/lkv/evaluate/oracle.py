"""What a selection could reach: the rows that the true questions, their answers and the continuation attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import lkv_ext
from lkv.policies.protocol import Observation
from lkv.policies.uniform import uniform_budgets

ORACLE, UNIFORM_ORACLE = "oracle", "uniform+oracle"


@dataclass(frozen=True)
class Oracle:
    """Budgets for scores that are given: `lkv.learn.targets.attention` of what comes after the text.

    Attributes:
        joint: all rows of all heads and layers compete; else all heads keep as many.
    """

    joint: bool = True

    needs: ClassVar[frozenset[str]] = frozenset()
    sink: ClassVar[int] = 4
    window: ClassVar[int] = 8

    @property
    def scope(self) -> str:
        return "model" if self.joint else "layer"

    def score(self, layer: int, observation: Observation) -> Tensor:
        """
        Raises:
            ValueError: always: no text tells what will be asked about it.
        """
        raise ValueError("lkv: expected the scores of an oracle to be given, as they depend on what comes after a text")

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        if not self.joint:
            return uniform_budgets(lengths, total)
        return lkv_ext.budgets_from_scores(
            scores, total, across="layers", lengths=lengths, starts=starts, sink=self.sink, window=self.window
        )


ORACLES = {ORACLE: Oracle(), UNIFORM_ORACLE: Oracle(joint=False)}
