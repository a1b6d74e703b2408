"""What one layer keeps: the answer of a policy, checked, on its way to the layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Choice:
    """Rows by score.

    Attributes:
        scores: float `[B, H, L]`; None: all rows stay.
        budgets: int `[B, H]`; None with the scores.
        held: per sequence, rows of all heads together that will be left.
        sink, window: the first and last rows of every head that stay whatever their scores.
    """

    scores: Tensor | None
    budgets: Tensor | None
    held: list[int]
    sink: int = 0
    window: int = 0
