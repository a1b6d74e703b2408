"""Heads of all layers compete for one total, over the scores of any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

import lkv_ext
from lkv.policies.base import LayerWrapper, refiner, refuse_second_pass
from lkv.policies.protocol import Policy
from lkv.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AcrossLayers(LayerWrapper):
    """The best rows of all heads of all layers share the total, and every head gets what it won.

    For scores that can be compared from layer to layer. Earlier layers shrink as later ones arrive (scope "cascade"),
    with the same rows in the end as if all were there: what wins against all layers wins against some. Over a scorer
    that chooses rows by budgets of heads all layers are divided among at once (scope "model").

    Attributes:
        scorer: the policy whose scores compete; its sink and window are protected. Its own budgets are not looked at.
    """

    scorer: Policy = field(default_factory=SnapKV)

    nested = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_second_pass(self)

    @property
    def scope(self) -> str:
        return "cascade" if refiner(self.scorer) is None else "model"

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        """int64 `[N, B, H]`."""
        return lkv_ext.budgets_from_scores(
            scores, total, across="layers", lengths=lengths, starts=starts, sink=self.sink, window=self.window
        )
