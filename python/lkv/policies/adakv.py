"""Ada-KV (arXiv 2407.11550): the heads of a layer compete for one budget, over the scores of any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import lkv_ext
from lkv.policies.protocol import Observation, Policy
from lkv.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV:
    """The best rows of all heads of a layer share its total, and every head gets what it won.

    Attributes:
        scorer: the policy whose scores compete; its sink and window are protected.
        alpha: how much every head is sure of, as a share of the mean budget.
        floor: "minimum": the best `int(alpha * mean budget)` rows of every head are sure, protected ones counted
            (kvpress); "blend": budgets are drawn towards the mean, `(1 - alpha) * won + alpha * mean` (the authors'
            code). They are different policies: with the first the excess is taken from the weakest rows of all heads.
    """

    scorer: Policy = field(default_factory=SnapKV)
    alpha: float = 0.2
    floor: str = "minimum"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"lkv.AdaKV: expected alpha in [0, 1], got {self.alpha}")
        if self.floor not in ("minimum", "blend"):
            raise ValueError(f"lkv.AdaKV: expected floor 'minimum' or 'blend', got {self.floor!r}")
        if self.scorer.scope != "layer":
            raise ValueError(f"lkv.AdaKV: expected a scorer of scope 'layer', got {self.scorer.scope!r}")

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs

    @property
    def scope(self) -> str:
        return "layer"

    @property
    def sink(self) -> int:
        return self.scorer.sink

    @property
    def window(self) -> int:
        return self.scorer.window

    def score(self, layer: int, observation: Observation) -> Tensor:
        return self.scorer.score(layer, observation)

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        options: dict[str, Any] = dict(lengths=lengths, starts=starts, sink=self.sink, window=self.window)
        if self.floor == "blend":
            return lkv_ext.budgets_from_scores(scores, total, floor=lkv_ext.Blend(self.alpha), **options)
        # The guaranteed rows depend on the total, which may differ between the sequences of a padded batch.
        sure = (total.double() / lengths.shape[1] * self.alpha).long().tolist()
        if len(set(sure)) <= 1:
            floor = lkv_ext.Minimum(sure[0] if sure else 0)
            return lkv_ext.budgets_from_scores(scores, total, floor=floor, **options)
        budgets = lengths.new_empty(lengths.shape)
        for b, rows in enumerate(sure):
            one: dict[str, Any] = {name: x[b : b + 1] if isinstance(x, Tensor) else x for name, x in options.items()}
            budgets[b] = lkv_ext.budgets_from_scores(
                scores[b : b + 1], total[b : b + 1], floor=lkv_ext.Minimum(rows), **one
            )[0]
        return budgets
