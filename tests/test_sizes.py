"""How many rows an output has, against a count of every segment by itself: exact where all is known, else a bound."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lkv_ext._common.sizes import Output, Segments, size_output, span

SIZES = st.integers(-2, 12)


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Segments, and integers of each form that they may have: one for all, per head or sequence, per segment."""
    layers, batch, heads = (draw(st.integers(1, 3)) for _ in range(3))
    count = layers * batch * heads
    rows = st.integers(0, 9)
    limits = draw(st.one_of(rows.map(lambda n: [n]), st.lists(rows, min_size=count, max_size=count)))

    def forms(*lengths: int) -> st.SearchStrategy:
        return st.sampled_from(lengths).flatmap(lambda n: st.lists(SIZES, min_size=n, max_size=n))

    short, full = batch * heads, count
    return dict(
        segments=Segments(layers, batch, heads, limits),
        budgets=draw(forms(1, heads, short, full)),
        lengths=draw(st.none() | forms(1, batch, short, full)),
        starts=draw(st.none() | forms(1, batch, short, full)),
        max_budget=draw(st.none() | st.integers(0, 9)),
        reserve=draw(st.integers(0, 3)),
        align=draw(st.integers(1, 4)),
    )


def spread(values: list[int], layer: int, b: int, h: int, sets: Segments, *, heads_first: bool) -> int:
    """The value of one segment: shapes are recognised by their sizes, longest first, as documented."""
    short = sets.batch * sets.heads
    if len(values) == sets.count and (heads_first or len(values) != sets.batch):
        return values[(layer * sets.batch + b) * sets.heads + h]
    if len(values) == 1:
        return values[0]
    if not heads_first and len(values) == sets.batch:
        return values[b]
    return values[b * sets.heads + h] if len(values) == short else values[h]


def kept(call: dict, sizes: tuple[int, int, int]) -> int:
    layer, b, h = sizes
    sets = call["segments"]
    at = (layer * sets.batch + b) * sets.heads + h
    tokens = sets.limits[0] if len(sets.limits) == 1 else sets.limits[at]
    start, length = 0, tokens
    if call["starts"] is not None:
        start = min(max(spread(call["starts"], layer, b, h, sets, heads_first=False), 0), tokens)
    if call["lengths"] is not None:
        length = max(spread(call["lengths"], layer, b, h, sets, heads_first=False), 0)
    there = min(length, tokens - start)
    budget = max(spread(call["budgets"], layer, b, h, sets, heads_first=True), 0)
    return min(budget, there, *([] if call["max_budget"] is None else [call["max_budget"]]))


def rounded(rows: int, align: int) -> int:
    return next(n for n in itertools.count(rows) if n % align == 0)


def every(call: dict) -> list[int]:
    sets = call["segments"]
    return [kept(call, x) for x in itertools.product(range(sets.layers), range(sets.batch), range(sets.heads))]


def size(call: dict, **changes: object) -> Output:
    return size_output(**(dict(layout="packed", capacity=None) | call | changes))


@given(calls())
def test_known_sizes_are_exact(call: dict) -> None:
    rows = every(call)
    spans = [rounded(n + call["reserve"], call["align"]) for n in rows]
    assert size(call) == (sum(spans), -1, max(rows))
    assert size(call, layout="padded") == (max(spans) * len(rows), max(spans), max(rows))


@given(calls(), st.integers(0, 8))
def test_a_capacity_cuts(call: dict, pages: int) -> None:
    capacity = pages * call["align"]
    exact, padded = size(call), size(call, layout="padded")
    total = min(exact.total, capacity)
    assert size(call, capacity=capacity) == (total, -1, min(exact.max_length, total))
    wide = min(padded.padded, capacity)
    count = call["segments"].count
    assert size(call, layout="padded", capacity=capacity) == (count * wide, wide, min(padded.max_length, wide))


@given(calls(), st.integers(0, 8))
def test_unknown_budgets_are_bounded(call: dict, pages: int) -> None:
    """By `max_budget` rows each, or by the capacity, which is then the size itself."""
    capacity = pages * call["align"]
    if call["max_budget"] is not None:
        most = every(call | dict(budgets=[call["max_budget"]]))
        spans = [rounded(n + call["reserve"], call["align"]) for n in most]
        assert size(call, budgets=None) == (sum(spans), -1, max(most))
    out = size(call, budgets=None, capacity=capacity)
    bound = max(every(call | dict(budgets=[capacity if call["max_budget"] is None else call["max_budget"]])))
    assert out == (capacity, -1, min(bound, capacity))
    out = size(call, budgets=None, capacity=capacity, layout="padded")
    assert out == (capacity * call["segments"].count, capacity, min(bound, capacity))


def test_segments_of_unknown_offsets_share_their_tokens() -> None:
    """Packed, all of them have no more rows than the input, and slack; padded, any of them may have all."""
    sets = Segments(1, 2, 2, [10], shared=True)
    call = dict(segments=sets, budgets=[8], lengths=None, starts=None, max_budget=None, reserve=0, align=1)
    assert size(call) == (10, -1, 8)
    assert size(call, budgets=[2]) == (8, -1, 2)
    assert size(call, layout="padded") == (32, 8, 8)
    # 10 rows and at most 3 + 3 rows of slack for each of 4 segments, in whole pages of 4.
    assert size(call, reserve=3, align=4) == (36, -1, 8)


def test_span() -> None:
    assert [span(n, 0, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert span(3, 2, 4) == 8 and span(3, 2, 1) == 5


def test_wrong_bounds() -> None:
    call = dict(segments=Segments(1, 1, 1, [4]), budgets=[2], lengths=None, starts=None, max_budget=None, reserve=0)
    for capacity, align in ((-4, 4), (6, 4)):
        with pytest.raises(ValueError, match=f"multiple of align = {align}, got {capacity}"):
            size(call, align=align, capacity=capacity)
    assert size(call, align=4, capacity=0).total == 0
    with pytest.raises(ValueError, match="expected max_budget >= 0, got -1"):
        size(call | dict(max_budget=-1), align=1)
    assert size(call | dict(max_budget=0), align=1) == (0, -1, 0)
