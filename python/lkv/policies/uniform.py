"""The budgets of methods that treat all heads alike."""

from __future__ import annotations

from torch import Tensor

from lkv_ext.shared import apportion


def rows_kept(length: int, retention: float) -> int:
    """Rows that a head keeps of `length` tokens, on average over heads: at least one."""
    return max(1, round(retention * length))


def uniform_budgets(lengths: Tensor, total: Tensor) -> Tensor:
    """int64 `[B, H]`: an even share of the total for every head of a sequence.

    What a head does not have (`lengths`, int64 `[B, H]`) goes to the others; a remainder to the lower heads.
    """
    even = lengths.new_ones(lengths.shape).double()
    return apportion(even, total.to(lengths.device), lengths.new_zeros(lengths.shape), lengths)
