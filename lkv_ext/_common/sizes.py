"""How many rows an output has.

The only place that sizes an output: the ops get the sizes as arguments, so that their fake kernels are trivial. Plain
Python over ints, which serves NumPy as well and traces under torch.compile: `min` and `max` become symbolic, without
guards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Segments(NamedTuple):
    """The (layer, sequence, KV head) triples of a call, R = layers * batch * heads, and how long they may be."""

    layers: int
    batch: int
    heads: int
    limits: Sequence[int]  # one for all or one per segment
    shared: bool = False  # ragged input of unknown offsets: the one limit is T, which all segments share
    stacked: bool = False  # the caller's integers have a layer axis, even for one layer

    @property
    def count(self) -> int:  # type: ignore[override]  # nobody counts the items of this tuple
        return self.layers * self.batch * self.heads

    def spread(self, values: Sequence[int]) -> Sequence[int]:
        """Values per segment from one value for all, one per head, or one per segment of a layer."""
        if len(values) == self.count:
            return values
        if len(values) == 1:
            return list(values) * self.count
        if len(values) == self.batch * self.heads:
            return list(values) * self.layers
        return list(values) * (self.layers * self.batch)

    def spread_sequences(self, values: Sequence[int]) -> Sequence[int]:
        """As `spread`, but the short form is one value per sequence."""
        if len(values) != self.batch:
            return self.spread(values)
        return [x for x in values for _ in range(self.heads)] * self.layers

    def lengths(self, lengths: Sequence[int] | None, starts: Sequence[int] | None) -> Sequence[int]:
        """The valid length of each segment, or one for all (an upper bound where it is not given)."""
        limits = self.limits
        if starts:
            limits = [m - max(0, min(s, m)) for s, m in self._beside(starts, limits)]
        if lengths:
            limits = [max(0, min(n, m)) for n, m in self._beside(lengths, limits)]
        return limits

    def too_long(self, lengths: Sequence[int]) -> int | None:
        """The first of the lengths that is more than the tokens of its segment; None: there is none."""
        return next((n for n, limit in self._beside(lengths, self.limits) if n > limit), None)

    def _beside(self, values: Sequence[int], limits: Sequence[int]) -> Iterable[tuple[int, int]]:
        if len(values) != 1 or len(limits) != 1:
            values, limits = self.spread_sequences(values), self.spread(limits)
        return zip(values, limits, strict=True)


class Output(NamedTuple):
    """Rows of the output: T' (packed) or R * C; C when padded, -1 when packed; a bound for the longest segment."""

    total: int
    padded: int
    max_length: int


def span(rows: int, reserve: int, align: int) -> int:
    """Rows of the span of a head that keeps `rows`."""
    return (rows + reserve + align - 1) // align * align


def _whole_pages(kept: int, length: int, page: int, exact: bool) -> int:
    """Rows that stay of `length` where whole pages are dropped and `kept` stay at least; not exact: a bound."""
    return length - (length - kept) // page * page if exact else min(length, kept + page - 1)


def size_output(
    segments: Segments,
    budgets: Sequence[int] | None,
    lengths: Sequence[int] | None,
    starts: Sequence[int] | None,
    *,
    layout: str,
    capacity: int | None,
    max_budget: int | None,
    reserve: int,
    align: int,
    back: int = 0,
    exact: bool = True,
) -> Output:
    """Sizes an output from what the host knows.

    `budgets` is None where only the device knows them: then `capacity` or `max_budget` bounds them (the caller sees to
    that). `lengths` and `starts` are None where they are not given or not known; then the result is a bound. `exact`:
    these are known, or not given. `back`: as in `Options`.
    """
    if capacity is not None and (capacity < 0 or capacity % align):
        raise ValueError(f"expected capacity >= 0 and a multiple of align = {align}, got {capacity}")
    if max_budget is not None and max_budget < 0:
        raise ValueError(f"expected max_budget >= 0, got {max_budget}")
    count = segments.count
    known = budgets is not None
    if budgets is None:
        bound = max_budget if max_budget is not None else capacity
        assert bound is not None
        budgets = [bound]
    limits = valid = segments.lengths(lengths, starts)
    if max_budget is not None:
        limits = [min(n, max_budget) for n in limits]
    if len(limits) == 1:
        kept, copies = [max(0, min(b, limits[0])) for b in budgets], count // (len(budgets) or 1)
    else:
        kept, copies = [max(0, min(b, n)) for b, n in zip(segments.spread(budgets), limits, strict=True)], 1
    if back > 1:
        known_lengths = exact and known
        rows = valid if len(valid) == len(kept) else list(valid) * len(kept)
        kept = [_whole_pages(n, m, back, known_lengths) for n, m in zip(kept, rows, strict=True)]
    longest = max(kept) if kept else 0
    total = copies * (sum(kept) if reserve == 0 and align == 1 else sum([span(n, reserve, align) for n in kept]))
    if segments.shared and layout == "packed":
        total = min(total, span(segments.limits[0] + count * (reserve + align - 1), 0, align))
    if layout == "padded":
        padded = span(longest, reserve, align)
        if capacity is not None:
            padded = min(padded, capacity) if known else capacity
        return Output(count * padded, padded, min(longest, padded))
    if capacity is not None:
        total = min(total, capacity) if known else capacity
        longest = min(longest, total)
    return Output(total, -1, longest)
