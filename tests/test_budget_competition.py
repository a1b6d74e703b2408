"""budgets_from_scores against full sorts, and by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lkv_ext
from lkv import reference

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
    tenths, rows = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 9))
    floor = data.draw(st.sampled_from([None, lkv_ext.Blend(tenths / 10), lkv_ext.Minimum(rows)]))
    total = [data.draw(st.integers(-1, 40)) for _ in range(batch)]
    exact = dict(
        sink=sink,
        window=window,
        blend=Fraction(tenths, 10) if isinstance(floor, lkv_ext.Blend) else None,
        minimum=rows if isinstance(floor, lkv_ext.Minimum) else 0,
    )

    def expected(chosen: list[torch.Tensor], b: int) -> list[int]:
        rows = [s[b, h] for s in chosen for h in range(heads)]
        ranges = [(min(starts[b], len(r)), max(0, min(lengths[b], len(r) - min(starts[b], len(r))))) for r in rows]
        return reference.budgets_from_scores(rows, total[b], ranges=ranges, **exact)

    options = dict(floor=floor, lengths=lengths, starts=starts, sink=sink, window=window)
    joint = lkv_ext.budgets_from_scores(scores, total, across="layers", **options)
    for b in range(batch):
        assert joint[:, b].flatten().tolist() == expected(scores, b)
    single = lkv_ext.budgets_from_scores(scores[0], total, **options)
    for b in range(batch):
        assert single[b].tolist() == expected(scores[:1], b)


@pytest.mark.parametrize("floor", [None, lkv_ext.Minimum(3), lkv_ext.Blend(0.3)], ids=str)
@pytest.mark.parametrize("sink, window", [(0, 0), (3, 1), (0, 4)])
def test_padding_in_front_changes_no_budget(floor, sink, window):
    """Whatever stands in it; sequences of a batch do not share a total."""
    scores, lengths, total = torch.rand(3, 4, 20, generator=torch.Generator().manual_seed(0)), [20, 13, 5], [37, 20, 11]
    options = dict(floor=floor, sink=sink, window=window)
    for junk in (9.0, -9.0, float("inf"), float("nan")):
        padded = scores.clone()
        for b, n in enumerate(lengths):
            padded[b] = torch.cat([torch.full((4, 20 - n), junk), scores[b, :, :n]], 1)
        starts = [20 - n for n in lengths]
        together = lkv_ext.budgets_from_scores(padded, total, lengths=lengths, starts=starts, **options)
        for b, n in enumerate(lengths):
            alone = lkv_ext.budgets_from_scores(scores[b : b + 1, :, :n], total[b], **options)
            assert torch.equal(together[b], alone[0])
    assert together.sum(1).tolist() == [37, 20, 11]


def test_ties_go_to_the_lower_layer_then_head_then_position():
    scores = [torch.ones(1, 2, 4), torch.ones(1, 2, 6)]
    for total, expected in (
        (3, [[3, 0], [0, 0]]),
        (6, [[4, 2], [0, 0]]),
        (11, [[4, 4], [3, 0]]),
        (15, [[4, 4], [6, 1]]),
    ):
        budgets = lkv_ext.budgets_from_scores(scores, total, across="layers")
        assert budgets[:, 0].tolist() == expected
    assert lkv_ext.budgets_from_scores(scores, 3).tolist() == [[[3, 0]], [[3, 0]]]
    nan, inf = float("nan"), float("inf")
    hostile = torch.tensor([[[nan, nan, -inf], [0.0, -0.0, nan]]])
    won = [lkv_ext.budgets_from_scores(hostile, total).tolist()[0] for total in range(7)]
    assert won == [[0, 0], [0, 1], [0, 2], [1, 2], [2, 2], [3, 2], [3, 3]]


def test_protected_rows_count_in_the_total():
    """Sink and window stay, whatever they score; a total that does not cover them is shared out."""
    scores = torch.tensor([[[0.0, 0, 0, 9, 8, 7, 6, 0.0], [0.0, 0, 0, 1, 2, 3, 4, 0.0]]])

    def budgets(total: int, **options: object) -> list[int]:
        return lkv_ext.budgets_from_scores(scores, total, **options)[0].tolist()

    assert budgets(10, sink=3, window=1) == [6, 4]
    assert budgets(14, sink=3, window=1) == [8, 6]
    assert budgets(12, sink=3, window=1) == [8, 4] and budgets(12, sink=1, window=3) == [6, 6]
    assert budgets(8, sink=3, window=1) == [4, 4] and budgets(7, sink=3, window=1) == [4, 3]
    assert budgets(5, sink=9) == [3, 2] and budgets(99, sink=9, window=9) == [8, 8]
    assert budgets(12, sink=3, window=1, floor=lkv_ext.Minimum(5)) == [7, 5]
    assert budgets(12, sink=3, window=1, floor=lkv_ext.Minimum(3)) == [8, 4]
    assert budgets(9, sink=3, window=1, floor=lkv_ext.Minimum(5)) == [5, 4]
    assert budgets(12, floor=lkv_ext.Minimum(99)) == [6, 6] and budgets(0) == [0, 0] == budgets(-5)
    # What a head won beyond the protected ones is blended: (4, 0), to (3, 1), (2, 2).
    assert [budgets(12, sink=3, window=1, floor=lkv_ext.Blend(a)) for a in (0, 0.5, 1)] == [[8, 4], [7, 5], [6, 6]]


def test_a_blend_may_leave_a_head_with_nothing():
    scores = torch.tensor([[[9.0, 9, 9, 9], [0.0, 0, 0, 0], [1.0, 0, 0, 0]]])
    for blend, expected in ((0.0, [4, 0, 1]), (0.1, [4, 0, 1]), (0.9, [2, 1, 2])):
        assert lkv_ext.budgets_from_scores(scores, 5, floor=lkv_ext.Blend(blend)).tolist() == [expected]
        heads, ranges = [list(head) for head in scores[0]], [(0, 4)] * 3
        wanted = reference.budgets_from_scores(heads, 5, ranges=ranges, blend=Fraction(blend))
        assert wanted == expected


def test_a_blend_goes_no_further_than_a_head_is_long():
    scores = torch.tensor([[[9.0, 9, 9, 9, 9, 9], [5.0, 5, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0]]])
    budgets = lkv_ext.budgets_from_scores(scores, 9, lengths=[[6, 2, 1]], floor=lkv_ext.Blend(1.0))
    assert budgets.tolist() == [[6, 2, 1]]
    budgets = lkv_ext.budgets_from_scores(scores, 8, lengths=[[6, 2, 1]], floor=lkv_ext.Blend(1.0))
    assert budgets.tolist() == [[5, 2, 1]]
    # Protected rows are there already: of six more, two each, the last head can take none and the second all it has.
    budgets = lkv_ext.budgets_from_scores(scores, 9, lengths=[[6, 3, 1]], sink=1, floor=lkv_ext.Blend(1.0))
    assert budgets.tolist() == [[5, 3, 1]]


def test_the_mean_of_a_blend_is_over_all_heads_that_compete():
    """Ten rows, all of which the first layer wins, between two heads, or four."""
    won, lost = torch.ones(1, 1, 12), torch.zeros(1, 1, 12)
    both = lkv_ext.budgets_from_scores([won, lost], 10, across="layers", floor=lkv_ext.Blend(0.5))
    assert both.flatten().tolist() == [8, 2]  # of 7.5 and 2.5
    pairs = [torch.cat([won, lost], 1), torch.cat([lost, lost], 1)]
    four = lkv_ext.budgets_from_scores(pairs, 12, across="layers", floor=lkv_ext.Blend(0.5))
    assert four.tolist() == [[[8, 2]], [[1, 1]]]  # of 7.5 and 1.5 each


@pytest.mark.parametrize("total", range(1, 10))
def test_a_mean_that_is_not_whole_is_blended_as_it_is(total):
    """Of three rows, all won by the first head, an alpha of 0.4 gives it 2.4 and the other 0.6: two and one."""
    scores = torch.tensor([[[9.0] * 12, [1.0] * 12]])
    for tenths in range(11):
        other = Fraction(tenths * total, 20)
        other = math.ceil(other - Fraction(1, 2))  # the nearest; a tie goes to the first head
        budgets = lkv_ext.budgets_from_scores(scores, total, floor=lkv_ext.Blend(tenths / 10))
        assert budgets.tolist() == [[total - other, other]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_and_any_strides(dtype):
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 30, 3, generator=g).to(dtype).transpose(1, 2)
    before = scores.clone()
    expected = lkv_ext.budgets_from_scores(scores.float().contiguous(), [20, 31], sink=2)
    assert torch.equal(lkv_ext.budgets_from_scores(scores, torch.tensor([20, 31]), sink=2), expected)
    assert torch.equal(scores, before)
    grown = scores.float().requires_grad_()
    assert torch.equal(lkv_ext.budgets_from_scores(grown, (20, 31), sink=2), expected)


def test_forms_of_totals_and_lengths():
    scores = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(2))
    expected = lkv_ext.budgets_from_scores(scores, [9, 9], lengths=[[6, 6, 6], [4, 4, 4]])
    for total in (9, [9], torch.tensor(9), torch.tensor([9]), torch.tensor([9, 9]).int()):
        for lengths in ([6, 4], torch.tensor([6, 4]), torch.tensor([[6, 6, 6], [4, 4, 4]]).int()):
            assert torch.equal(lkv_ext.budgets_from_scores(scores, total, lengths=lengths), expected)
    assert lkv_ext.budgets_from_scores(scores, 9, lengths=5).sum(1).tolist() == [9, 9]
    assert lkv_ext.budgets_from_scores(scores, 99, lengths=-2).sum() == 0
    assert lkv_ext.budgets_from_scores(scores, 99, lengths=5, starts=6).unique().tolist() == [2]
    assert lkv_ext.budgets_from_scores(scores, 99, starts=-3).unique().tolist() == [8]
    assert lkv_ext.budgets_from_scores(scores, 99, lengths=9, starts=11).sum() == 0
    for shape in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        assert lkv_ext.budgets_from_scores(torch.zeros(shape), 5).tolist() == torch.zeros(shape[:2]).long().tolist()
        both = lkv_ext.budgets_from_scores([torch.zeros(shape)] * 2, 5, across="layers", floor=lkv_ext.Blend(0.5))
        assert both.shape == (2, *shape[:2]) and both.dtype == torch.int64
    with pytest.raises(ValueError, match=r"expected total as an int or of shape \[B\] = \[2\], got \[3\]"):
        lkv_ext.budgets_from_scores(scores, [1, 2, 3])
    with pytest.raises(ValueError, match=r"expected total as an int or of shape \[B\] = \[2\], got \[1, 2\]"):
        lkv_ext.budgets_from_scores(scores, torch.tensor([[1, 2]]))


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
            ranges = [(int(starts[n, b, h]), int(lengths[n, b, h])) for n in layers for h in range(3)]
            expected = reference.budgets_from_scores(rows, total, ranges=ranges, sink=1, window=2)
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
        (ValueError, dict(scores=[torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, device="meta")], total=1)),
        (ValueError, dict(scores=torch.zeros(1, 2, 3), total=1, across="tokens")),
        (TypeError, dict(scores=torch.zeros(1, 2, 3), total=1, floor=0.2)),
        (TypeError, dict(scores=torch.zeros(1, 2, 3).double(), total=1)),
        (ValueError, dict(scores=torch.zeros(1, 2, 3), total=1, sink=-1)),
        (ValueError, dict(scores=torch.zeros(1, 2, 3), total=1, window=-1)),
        (ValueError, dict(scores=torch.zeros(2, 3, 8), total=1, lengths=torch.zeros(3, 2).long())),
        (ValueError, dict(scores=torch.zeros(2, 3, 8), total=1, starts=[1, 2, 3])),
        (ValueError, dict(scores=[], total=1)),
    ],
)
def test_bad_scores(error, arguments):
    with pytest.raises(error, match="lkv_ext.budgets_from_scores: expected"):
        lkv_ext.budgets_from_scores(arguments.pop("scores"), **arguments)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), "half", None])
def test_bad_blends(alpha):
    with pytest.raises((ValueError, TypeError), match=r"lkv_ext.Blend: expected alpha in \[0, 1\]"):
        lkv_ext.Blend(alpha)


@pytest.mark.parametrize("rows", [-1, 2.5, "two", None])
def test_bad_minima(rows):
    with pytest.raises((ValueError, TypeError), match="lkv_ext.Minimum: expected rows"):
        lkv_ext.Minimum(rows)


def test_numbers_of_other_kinds():
    """Rules of equal numbers are equal, whatever type the number has."""
    for alpha in (0.25, np.float32(0.25), np.float64(0.25)):
        blend = lkv_ext.Blend(alpha)
        assert blend == lkv_ext.Blend(0.25) and type(blend.alpha) is float
    assert type(lkv_ext.Blend(1).alpha) is float
    assert lkv_ext.Minimum(np.int64(3)) == lkv_ext.Minimum(3) and type(lkv_ext.Minimum(np.int64(3)).rows) is int
