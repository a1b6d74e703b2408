"""Ada-KV (arXiv 2407.11550): the heads of a layer compete for one budget, over the scores of any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import lkv_ext
from lkv.policies.base import Wrapper
from lkv.policies.protocol import Layered, Policy
from lkv.policies.snapkv import SnapKV


def _authors() -> SnapKV:
    return SnapKV(window=32, kernel_size=7, pooling="max", group="mean", group_first=True)


@dataclass(frozen=True)
class AdaKV(Wrapper):
    """The best rows of all heads of a layer share its total, and every head gets what it won.

    The default is the authors' code (Ada-SnapKV): SnapKV's scores of a window of 32, averaged over the group and then
    pooled by a maximum of 7, and budgets that are blended with the mean. kvpress has `AdaKV(SnapKV(window=64),
    floor="minimum")`. The authors round the budget of every head, so that their total is off by some rows; ours is
    exact, by largest remainder.

    Attributes:
        scorer: the policy whose scores compete; its sink and window are protected.
        alpha: how much every head is sure of, as a share of the mean budget.
        floor: "blend": budgets are drawn towards the mean, `(1 - alpha) * won + alpha * mean` (the authors' code);
            "minimum": the best `int(alpha * mean budget)` rows of every head are sure, protected ones counted
            (kvpress). They are different policies: with the second the excess is taken from the weakest rows of all
            heads, and nothing is sure beyond the window where that is longer.
    """

    scorer: Policy = field(default_factory=_authors)
    alpha: float = 0.2
    floor: str = "blend"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"lkv.AdaKV: expected alpha in [0, 1], got {self.alpha}")
        if self.floor not in ("minimum", "blend"):
            raise ValueError(f"lkv.AdaKV: expected floor 'minimum' or 'blend', got {self.floor!r}")
        super().__post_init__()
        if isinstance(self.scorer, Layered):
            rule = type(self.scorer).__name__
            raise ValueError(f"lkv.AdaKV: expected a policy without budgets for layers, got {rule}: put AdaKV inside")

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
