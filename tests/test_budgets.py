"""budgets_from_shares and budgets_from_scores against exact arithmetic and full sorts."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lkv_ext
from lkv import reference

shares_and_lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=8)


@given(shares_and_lengths, st.integers(0, 300), st.integers(0, 5), st.none() | st.integers(5, 30))
def test_shares_match_exact_arithmetic(heads, total, floor, cap):
    shares, lengths = zip(*heads, strict=True)
    expected = reference.budgets_from_shares(shares, total, lengths, floor=floor, cap=cap)
    floors = sum(min(floor, n if cap is None else min(n, cap)) for n in lengths)
    if total < floors:
        with pytest.raises(ValueError, match="at least the floors"):
            lkv_ext.budgets_from_shares(shares, total=total, lengths=lengths, floor=floor, cap=cap)
        return
    got = lkv_ext.budgets_from_shares(shares, total=total, lengths=lengths, floor=floor, cap=cap)
    assert got.tolist() == expected


def test_retention_and_ties_go_to_the_lower_index():
    budgets = lkv_ext.budgets_from_shares([1.0, 1.0, 1.0, 1.0], retention=0.15, lengths=100)
    assert budgets.tolist() == [15, 15, 15, 15]
    assert lkv_ext.budgets_from_shares([[1.0, 1.0], [1.0, 1.0]], total=5, lengths=9).tolist() == [[2, 1], [1, 1]]


def test_excess_of_full_heads_is_poured_over_the_others():
    assert lkv_ext.budgets_from_shares([8.0, 1.0, 1.0], total=30, lengths=100, cap=10).tolist() == [10, 10, 10]
    assert lkv_ext.budgets_from_shares([8.0, 1.0, 1.0], total=20, lengths=[6, 100, 100]).tolist() == [6, 7, 7]


@pytest.mark.parametrize(
    "arguments",
    [
        dict(shares=[1.0, -1.0], total=3, lengths=5),
        dict(shares=[1.0, float("nan")], total=3, lengths=5),
        dict(shares=[1.0], lengths=5),
        dict(shares=[1.0], total=3, retention=0.5, lengths=5),
        dict(shares=[1.0], retention=1.5, lengths=5),
        dict(shares=[1.0], total=3, lengths=5, floor=4, cap=3),
    ],
)
def test_bad_shares(arguments):
    with pytest.raises(ValueError, match="lkv_ext.budgets_from_shares: expected"):
        lkv_ext.budgets_from_shares(arguments.pop("shares"), **arguments)


values = st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.5, float("inf"), float("-inf"), float("nan")])


@given(st.data())
def test_competition_matches_a_full_sort(data):
    layers = data.draw(st.integers(1, 3))
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    tokens = [data.draw(st.integers(0, 8)) for _ in range(layers)]
    draw = lambda n: torch.tensor(data.draw(st.lists(values, min_size=batch * heads * n, max_size=batch * heads * n)))  # noqa: E731
    scores = [draw(n).view(batch, heads, n) for n in tokens]
    starts = [data.draw(st.integers(0, 4)) for _ in range(batch)]
    lengths = [data.draw(st.integers(0, 9)) for _ in range(batch)]
    sink, window = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    floor = data.draw(st.sampled_from([None, lkv_ext.Blend(0.25), lkv_ext.Minimum(2)]))
    total = [data.draw(st.integers(0, 40)) for _ in range(batch)]
    exact = dict(
        sink=sink,
        window=window,
        blend=Fraction(floor.alpha) if isinstance(floor, lkv_ext.Blend) else None,
        minimum=floor.rows if isinstance(floor, lkv_ext.Minimum) else 0,
    )

    def expected(chosen: list[torch.Tensor], b: int) -> list[int]:
        rows = [s[b, h] for s in chosen for h in range(heads)]
        spans = [(min(starts[b], len(r)), max(0, min(lengths[b], len(r) - min(starts[b], len(r))))) for r in rows]
        return reference.budgets_from_scores(rows, total[b], spans=spans, **exact)

    options = dict(floor=floor, lengths=lengths, starts=starts, sink=sink, window=window)
    joint = lkv_ext.budgets_from_scores(scores, total, across="layers", **options)
    for b in range(batch):
        assert joint[:, b].flatten().tolist() == expected(scores, b)
    single = lkv_ext.budgets_from_scores(scores[0], total, **options)
    for b in range(batch):
        assert single[b].tolist() == expected(scores[:1], b)


@pytest.mark.parametrize("across", ["heads", "layers"])
def test_lengths_of_every_layer(across):
    """`[N, B, H]`: a later turn, when layers have kept different numbers of rows."""
    g = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, 3, n, generator=g) for n in (20, 12)]
    lengths = torch.stack([torch.randint(0, n + 1, (2, 3), generator=g) for n in (20, 12)])
    starts = torch.stack([torch.randint(0, 4, (2, 3), generator=g) for _ in range(2)])
    lengths = lengths.minimum(torch.tensor([20, 12])[:, None, None] - starts)
    options = dict(across=across, lengths=lengths, starts=starts, sink=1, window=2)
    got = lkv_ext.budgets_from_scores(scores, [17, 9], **options)
    for b, total in enumerate([17, 9]):
        for layers in [(0, 1)] if across == "layers" else [(0,), (1,)]:
            rows = [scores[n][b, h] for n in layers for h in range(3)]
            spans = [(int(starts[n, b, h]), int(lengths[n, b, h])) for n in layers for h in range(3)]
            expected = reference.budgets_from_scores(rows, total, spans=spans, sink=1, window=2)
            assert got[list(layers), b].flatten().tolist() == expected


def test_published_example_of_blend_and_minimum():
    """The worked Ada-KV case: two heads, ten rows each, a window of two, seven rows a head on average."""
    h0 = [0.30, 0.22, 0.15, 0.09, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005]
    h1 = [0.12, 0.11, 0.10, 0.08, 0.07, 0.06, 0.055, 0.045, 0.035, 0.025]
    scores = torch.tensor([[h0 + [0.0, 0.0], h1 + [0.0, 0.0]]])
    plain = lkv_ext.budgets_from_scores(scores, 14, window=2)
    blend = lkv_ext.budgets_from_scores(scores, 14, window=2, floor=lkv_ext.Blend(0.2))
    floor = lkv_ext.budgets_from_scores(scores, 14, window=2, floor=lkv_ext.Minimum(1))
    assert plain.tolist() == blend.tolist() == floor.tolist() == [[6, 8]]


def test_budgets_keep_what_won():
    torch.manual_seed(0)
    k, scores = torch.randn(2, 4, 50, 8), torch.rand(2, 4, 50)
    budgets = lkv_ext.budgets_from_scores(scores, 30)
    out = lkv_ext.evict(k, None, scores, budgets)
    assert out.lengths.sum(1).tolist() == [30, 30]
    for b in range(2):
        threshold = scores[b].flatten().sort(descending=True).values[29]
        assert torch.equal(out.lengths[b].long(), (scores[b] >= threshold).sum(1))


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, dict(scores=torch.zeros(2, 3), total=1)),
        (ValueError, dict(scores=[torch.zeros(1, 2, 3), torch.zeros(1, 3, 3)], total=1)),
        (ValueError, dict(scores=torch.zeros(1, 2, 3), total=1, across="tokens")),
        (TypeError, dict(scores=torch.zeros(1, 2, 3), total=1, floor=0.2)),
        (ValueError, dict(scores=[], total=1)),
    ],
)
def test_bad_scores(error, arguments):
    with pytest.raises(error, match="lkv_ext.budgets_from_scores: expected"):
        lkv_ext.budgets_from_scores(arguments.pop("scores"), **arguments)
