"""Which rows stay: the best scores between the sink and the window, in ascending position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lkv.reference.spans import Spans


def select_row(scores: Tensor, keep: int, *, start: int, length: int, sink: int = 0, window: int = 0) -> Tensor:
    """Positions to keep of one row of scores `[L]`, valid in `[start, start + length)`; int64, ascending.

    The first `min(sink, keep)` and the last `min(window, rest)` valid tokens, and of those between the best by
    (is-NaN, score), ties to the lower position. `keep` is at most `length`.
    """
    sink = min(sink, keep)
    window = min(window, keep - sink)
    first, last = start + sink, start + length - window
    values = scores[first:last]
    # Two stable sorts, the lesser criterion first. torch's sort takes -0 and +0 for equal.
    by_score = torch.where(values.isnan(), 0, values).argsort(descending=True, stable=True)
    ranked = by_score[values.isnan()[by_score].byte().argsort(stable=True)]
    best = first + ranked[: keep - sink - window]
    begin, end = (torch.arange(*ends, device=scores.device) for ends in ((start, first), (last, start + length)))
    return torch.cat([begin, best.sort().values, end])


def select(
    rows: Sequence[Tensor], ranges: Sequence[tuple[int, int]], where: Spans, *, sink: int = 0, window: int = 0
) -> Tensor:
    """Positions of all segments in their spans, int32 `[total]`; -1 in slack.

    Args:
        rows: scores of each segment, `[L]`.
        ranges: (start, length) of the valid range of each.
    """
    device = rows[0].device if rows else "cpu"
    positions = torch.full((where.total,), -1, dtype=torch.int32, device=device)
    for scores, (start, length), keep, (offset, _) in zip(
        rows, ranges, where.kept, pairwise(where.offsets), strict=True
    ):
        chosen = select_row(scores, keep, start=start, length=length, sink=sink, window=window)
        positions[offset : offset + keep] = chosen.int()
    return positions
