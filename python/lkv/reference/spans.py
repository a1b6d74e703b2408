"""How many rows each segment keeps, and where its span begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Spans:
    """All lists have one entry per segment, in (b, h) order; `offsets` has one more, the end of the last span."""

    kept: list[int]
    offsets: list[int]
    total: int  # rows of the output, at least the end of the last span
    padded: int | None  # C of a padded output
    cut: int  # rows that did not fit


def spans(
    budgets: Sequence[int],
    lengths: Sequence[int],
    *,
    layout: str = "packed",
    capacity: int | None = None,
    max_budget: int | None = None,
    page: int = 1,
    reserve: int = 0,
    align: int = 1,
    total: int | None = None,
) -> Spans:
    """`keep = clamp(budget, 0, length)`, at most `max_budget`; `span = keep + reserve`, rounded up to `align`.

    What is dropped is a multiple of `page`: `keep` becomes `length - floor((length - keep) / page) * page`.
    Spans lie one after the other. A span that would end after `capacity` ends there, and so do its rows. In a padded
    output all spans are as long as the longest. `total` is the size of the output; default: the sum of the spans.
    """
    wanted = [max(0, min(budget, length)) for budget, length in zip(budgets, lengths, strict=True)]
    kept = [n if max_budget is None else min(n, max_budget) for n in wanted]
    wanted, kept = (
        [length - (length - n) // page * page for n, length in zip(rows, lengths, strict=True)]
        for rows in (wanted, kept)
    )
    needed = [-(-(n + reserve) // align) * align for n in kept]
    if layout == "padded":
        padded = max(needed, default=0) if total is None else total // max(len(kept), 1)
        padded = padded if capacity is None else min(padded, capacity)
        kept = [min(n, padded) for n in kept]
        offsets = [i * padded for i in range(len(kept) + 1)]
        return Spans(kept, offsets, offsets[-1], padded, sum(wanted) - sum(kept))
    end = sum(needed) if total is None else total
    end = end if capacity is None else min(end, capacity)
    offsets = [0]
    for i, span in enumerate(needed):
        kept[i] = min(kept[i], end - offsets[-1])
        offsets.append(min(offsets[-1] + span, end))
    return Spans(kept, offsets, end, None, sum(wanted) - sum(kept))
