"""LAVa (arXiv 2509.09754): layers share a total by the entropy of their scores, heads of a layer compete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import lkv_ext
from lkv.policies.adakv import AdaKV
from lkv.policies.attention import evictable
from lkv.policies.base import ImportanceWrapper, ScoreWrapper, refiner, refuse_second_pass
from lkv.policies.protocol import Observation, Policy
from lkv.policies.snapkv import SnapKV
from lkv_ext.shared import apportion


@dataclass(frozen=True)
class LAVaScore(ScoreWrapper):
    """Scores of a window times the largest L1 norm of any value of the head, which makes heads comparable.

    SnapKV's with a maximum of 7 and the maximum over the group, which commute.

    Attributes:
        scorer: whose scores they are.
        before: only values before the window count, as in the authors' code.
    """

    scorer: Policy = field(
        default_factory=lambda: SnapKV(window=32, kernel_size=7, pooling="max", group="max", group_first=True)
    )
    before: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_second_pass(self)

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`."""
        counted = evictable(observation, self.window) if self.before else observation.valid()
        norms = torch.linalg.vector_norm(observation.values, 1, dim=-1, dtype=torch.float32)
        largest = norms.masked_fill(~counted, 0).amax(-1, keepdim=True)
        return self.scorer.score(layer, observation) * largest


@dataclass(frozen=True)
class LAVa(ImportanceWrapper):
    """Every layer gets its share of `e_l`, the entropy of its scores over all heads and rows before the window.

    `s = scores / sum(scores)`, `e_l = -sum(s log s) / (H N)` for N rows before the window, and of the rows beside
    the window layer l keeps `e_l / sum(e)`, none more than it has. Heads of a layer compete for them, without a floor.

    Earlier layers shrink as later ones arrive (scope "cascade"), with the same rows in the end as if all layers were
    there, as shares only fall. Over a scorer that chooses rows by budgets of heads all layers are divided among at once
    (scope "model").

    Attributes:
        scorer: scores, and budgets of the heads of a layer.
        code: the authors' code: values of the window do not count, and every head gets `0.8 * won + 0.2 * C`, C being
            the mean budget with the window, so that layers are drawn towards each other. Their code keeps more than C
            then (4.5 % at 128 rows); here these budgets are scaled to the exact total. See `lava_code`.
    """

    scorer: Policy = field(default_factory=lambda: AdaKV(LAVaScore(), alpha=0.0))
    code: bool = False

    @property
    def scope(self) -> str:
        return "model" if refiner(self.scorer) is not None else "cascade"

    @property
    def nested(self) -> bool:
        """The rows of a smaller budget are the best of those of a larger one: no scores of others are looked at."""
        return not self.code and isinstance(self.scorer, AdaKV) and self.scorer.alpha == 0

    @property
    def slack(self) -> int:
        return 1 if self.nested else 4

    def importance(self, layer: int, observation: Observation, scores: Tensor) -> Tensor:
        return entropies(scores, evictable(observation, self.window, self.sink))

    def divide(self, importance: list[float], total: int, lengths: Tensor) -> Tensor:
        sure = lengths.clamp(max=self.sink + self.window).sum(1)
        there, rest = lengths.sum(1), total - int(sure.sum())
        if rest <= 0:
            even = torch.ones(1, len(there), dtype=torch.float64, device="cpu")
            return apportion(even, torch.tensor([total], device="cpu"), sure[None] * 0, sure[None])[0]
        return sure + lkv_ext.budgets_from_shares(importance, total=rest, lengths=there - sure)

    def budgets(
        self,
        scores: Tensor | Sequence[Tensor],
        lengths: Tensor,
        total: Tensor,
        *,
        starts: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Tensor:
        budgets = super().budgets(scores, lengths, total, starts=starts, importance=importance)
        if not self.code:
            return budgets
        layers, batch, heads = lengths.shape
        sure = lengths.clamp(max=self.sink + self.window)
        mean = (total.to(lengths.device) // (layers * heads))[None, :, None]
        wish = code_caps((budgets.to(lengths.device) - sure).clamp(min=0), mean)
        # The authors keep them all: here they are what budgets are in proportion to.
        flat = [x.transpose(0, 1).flatten(1) for x in (wish.double(), sure, lengths)]
        lower = flat[1] * (total.to(lengths.device) >= flat[1].sum(1))[:, None]
        caps = apportion(flat[0], total.to(lengths.device) - lower.sum(1), lower * 0, flat[2] - lower)
        return (lower + caps).view(batch, layers, heads).transpose(0, 1)


def lava_code() -> LAVa:
    """The authors' code, but for its rounding and what it keeps beyond the budget."""
    return LAVa(AdaKV(LAVaScore(before=True), alpha=0.0), code=True)


def code_caps(won: Tensor, mean: int | Tensor, alpha: float = 0.2) -> Tensor:
    """Rows beside the window that the authors' code gives to heads that won `won`: `round(0.8 won) + int(0.2 C)`."""
    floor = (mean * alpha).long() if isinstance(mean, Tensor) else int(mean * alpha)
    return ((1 - alpha) * won.double() + floor).round().long()


def entropies(scores: Tensor, counted: Tensor) -> Tensor:
    """float32 `[B]`: the entropy of scores over all heads and rows that count, over their number."""
    weights = scores.float().masked_fill(~counted, 0).flatten(1)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.special.entr(weights).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
