"""Budgets per head, in exact arithmetic and full sorts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor


def apportion(wishes: Sequence[Fraction], total: int, lower: Sequence[int], upper: Sequence[int]) -> list[int]:
    """Integers near `clamp(t * wish, lower, upper)` that sum to the total: water-filling, then largest remainder."""
    total = min(max(total, sum(lower)), sum(upper))
    exact = [Fraction(x) for x in lower]
    # Wishes of zero are served when nobody else can take more.
    for group in ([w if w > 0 else Fraction(0) for w in wishes], [Fraction(int(w == 0)) for w in wishes]):
        corners = sorted(
            {Fraction(bound, 1) / w for w, lo, up in zip(group, lower, upper, strict=True) if w for bound in (lo, up)}
        )
        base = exact

        def filled(t: Fraction, group: list[Fraction] = group, base: list[Fraction] = base) -> list[Fraction]:
            ends = zip(group, base, map(Fraction, upper), strict=True)
            return [min(max(t * w, b), up) if w else b for w, b, up in ends]

        at = next((i for i, t in enumerate(corners) if sum(filled(t)) >= total), None)
        if at is None:
            exact = filled(corners[-1]) if corners else base
            continue
        t1, t0 = corners[at], corners[at - 1] if at else Fraction(0)
        s1, s0 = sum(filled(t1)), sum(filled(t0))
        exact = filled(t1 if s1 == s0 else t0 + (t1 - t0) * (total - s0) / (s1 - s0))
        break
    whole = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(whole)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def budgets_from_shares(
    shares: Sequence[float], total: int, lengths: Sequence[int], *, floor: int = 0, cap: int | None = None
) -> list[int]:
    """`lkv_ext.budgets_from_shares` for flat lists."""
    upper = [n if cap is None else min(n, cap) for n in lengths]
    return apportion([Fraction(s) for s in shares], total, [min(floor, n) for n in upper], upper)


def budgets_from_scores(
    heads: Sequence[Tensor],
    total: int,
    *,
    ranges: Sequence[tuple[int, int]],
    sink: int = 0,
    window: int = 0,
    blend: Fraction | None = None,
    minimum: int = 0,
) -> list[int]:
    """`lkv_ext.budgets_from_scores` for one sequence.

    Args:
        heads: scores `[L]` of every competing head, in (layer, head) order.
        ranges: (start, length) of the valid range of each.
    """
    sure, contest = [], []
    for i, (scores, (start, length)) in enumerate(zip(heads, ranges, strict=True)):
        first = min(sink, length)
        last = min(window, length - first)
        free = [(scores[p].item(), i, p) for p in range(start + first, start + length - last)]
        free.sort(key=lambda entry: (math.isnan(entry[0]), 0 if math.isnan(entry[0]) else -entry[0]))
        extra = max(0, min(minimum, length) - first - last)
        sure.append(first + last + extra)
        contest += free[extra:]
    if total < sum(sure):
        return apportion([Fraction(1)] * len(sure), total, [0] * len(sure), sure)
    contest.sort(key=lambda entry: (math.isnan(entry[0]), 0 if math.isnan(entry[0]) else -entry[0], *entry[1:]))
    won = [0] * len(heads)
    for _, i, _ in contest[: total - sum(sure)]:
        won[i] += 1
    if blend is not None:
        wishes = [(1 - blend) * n + blend * Fraction(sum(won), len(won)) for n in won]
        available = [length - n for (_, length), n in zip(ranges, sure, strict=True)]
        won = apportion(wishes, sum(won), [0] * len(won), available)
    return [a + b for a, b in zip(sure, won, strict=True)]
