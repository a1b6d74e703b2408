"""budgets_from_shares against exact arithmetic, and by hand."""

from __future__ import annotations

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


@given(
    st.lists(st.tuples(st.floats(-25, 3) | st.none(), st.integers(0, 40)), min_size=1, max_size=8),
    st.integers(0, 150),
)
def test_shares_however_skewed(heads, total):
    """25 orders of magnitude apart, and zeros, which are served once all others are full."""
    shares, lengths = [0.0 if e is None else 10.0**e for e, _ in heads], [n for _, n in heads]
    expected = reference.budgets_from_shares(shares, total, lengths)
    assert lkv_ext.budgets_from_shares(shares, total=total, lengths=lengths).tolist() == expected


def test_skewed_shares_by_hand():
    def budgets(shares: object, total: int, lengths: object, **bounds: int) -> list[int]:
        return lkv_ext.budgets_from_shares(shares, total=total, lengths=lengths, **bounds).tolist()

    assert budgets([1.0, 1e-14, 0.0], 60, [10, 100, 100]) == [10, 50, 0]
    assert budgets([1.0, 1e-14, 1e-20], 60, [10, 100, 100]) == [10, 50, 0]
    assert budgets([1.0, 1e-14, 0.0], 117, [10, 100, 100]) == [10, 100, 7]
    assert budgets([0.0, 1.0, 0.0], 13, [10, 4, 10]) == [5, 4, 4]
    assert budgets([0.0, 1.0, 0.0], 7, [10, 10, 10], floor=2) == [2, 3, 2]
    assert budgets([0.0, 0.0, 0.0], 7, 10) == [3, 2, 2]
    assert budgets([2.0**25, 2.0**25 + 1], 1, 5) == [0, 1]  # equal in float32, which a list of floats never was
    assert budgets([2.0**-149, 2.0**-148], 3, 5) == [1, 2]


def test_largest_remainder():
    """Of 7/6, 14/6 and 21/6 the last has the largest; of equal ones the lower head goes first."""
    assert lkv_ext.budgets_from_shares([1, 2, 3], total=7, lengths=9).tolist() == [1, 2, 4]
    assert lkv_ext.budgets_from_shares([3, 3, 1], total=2, lengths=9).tolist() == [1, 1, 0]
    assert lkv_ext.budgets_from_shares([1, 3, 3, 1], total=4, lengths=9).tolist() == [1, 2, 1, 0]
    assert lkv_ext.budgets_from_shares([5, 1, 1, 1], total=4, lengths=[2, 9, 9, 9]).tolist() == [2, 1, 1, 0]
    assert lkv_ext.budgets_from_shares([1] * 99, total=40, lengths=9).tolist() == [1] * 40 + [0] * 59
    # 8/3, 8/3, 2, 2/3; and 14 rows in the ratio of 4 : 1 : 1: a third is a third, whatever it came from.
    assert lkv_ext.budgets_from_shares([8, 8, 6, 2], total=8, lengths=[3, 3, 12, 5]).tolist() == [3, 3, 2, 0]
    assert lkv_ext.budgets_from_shares([6, 4, 1, 1], total=15, lengths=[1, 12, 3, 10]).tolist() == [1, 10, 2, 2]


def test_bounds_of_heads():
    def budgets(total: int, **bounds: int) -> list[int]:
        return lkv_ext.budgets_from_shares([6.0, 3.0, 1.0], total=total, lengths=[100, 100, 2], **bounds).tolist()

    assert budgets(10) == [6, 3, 1]
    assert budgets(10, floor=3) == [5, 3, 2]  # the last one has no more
    assert budgets(8, floor=3) == [3, 3, 2]
    assert budgets(10, cap=4) == [4, 4, 2]
    assert budgets(300, cap=30) == [30, 30, 2] and budgets(300) == [100, 100, 2]
    with pytest.raises(ValueError, match=r"expected a total of at least the floors, 8, got 7 \(floor 3\)"):
        budgets(7, floor=3)
    with pytest.raises(ValueError, match="expected a total of at least the floors, 0, got -1"):
        budgets(-1)
    with pytest.raises(ValueError, match="expected 0 <= floor <= cap, got -1 and None"):
        budgets(10, floor=-1)
    assert budgets(0) == [0, 0, 0] and budgets(10, floor=4, cap=4) == [4, 4, 2]


@pytest.mark.parametrize(
    ("retention", "lengths", "total"),
    [(0.5, [1, 2, 2], 2), (0.5, [2, 2, 3], 4), (0.3, [1, 2, 2], 2), (0.0, 9, 0), (1.0, [4, 0, 7], 11), (1, 5, 15)],
)
def test_retention_is_of_all_tokens(retention, lengths, total):
    """Rounded to the nearest number of rows, halves to the even one; a cap comes afterwards."""
    budgets = lkv_ext.budgets_from_shares([1.0, 1.0, 1.0], retention=retention, lengths=lengths)
    assert int(budgets.sum()) == total and (budgets <= torch.as_tensor(lengths)).all()
    for some in (0.5, 1.0):
        capped = lkv_ext.budgets_from_shares([1.0, 1.0, 1.0], retention=some, lengths=[100, 100, 3], cap=10)
        assert capped.tolist() == [10, 10, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_shares_and_lengths_of_any_form(dtype):
    shares = torch.tensor([[8, 4], [2, 2]], dtype=dtype)
    expected = [[8, 4], [2, 2]]
    for lengths in (40, [40, 40], [[40, 40], [40, 40]], torch.tensor([[40], [40]]), torch.full((2, 2), 40).int()):
        budgets = lkv_ext.budgets_from_shares(shares, total=16, lengths=lengths)
        assert budgets.tolist() == expected and budgets.dtype == torch.int64
    assert lkv_ext.budgets_from_shares(shares.tolist(), total=16, lengths=40).tolist() == expected
    assert lkv_ext.budgets_from_shares(shares.float().numpy(), total=16, lengths=40).tolist() == expected
    grown = shares.float().requires_grad_()
    assert not lkv_ext.budgets_from_shares(grown, total=16, lengths=40).requires_grad
    assert lkv_ext.budgets_from_shares(shares[:0], total=3, lengths=40).shape == (0, 2)
    assert lkv_ext.budgets_from_shares(torch.zeros(0), retention=0.5, lengths=40).tolist() == []
    with pytest.raises(ValueError, match=r"expected lengths that broadcast to shares of shape \[2, 2\], got \[3\]"):
        lkv_ext.budgets_from_shares(shares, total=16, lengths=[1, 2, 3])


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_a_model_of_many_heads_spends_its_total(sharpness):
    """32 layers of 32 heads, a million tokens each: no row is lost or made, none beyond a head's own."""
    g = torch.Generator().manual_seed(0)
    shares = (torch.randn(32, 32, generator=g, dtype=torch.float64) * sharpness).flatten().softmax(0).view(32, 32)
    lengths = torch.randint(1, 10**6, (32, 32), generator=g)
    for total in (0, 1, 1023, 1024, 123_456_789, int(lengths.sum()) - 1, int(lengths.sum())):
        budgets = lkv_ext.budgets_from_shares(shares, total=total, lengths=lengths)
        assert int(budgets.sum()) == total
        assert (budgets >= 0).all() and (budgets <= lengths).all()
        # There is one level, the budget of a whole share, that all heads are a row from at most, or full.
        least, most = ((budgets - 1) / shares).max(), ((budgets + 1) / shares)[budgets < lengths]
        assert (most >= least * (1 - 1e-9)).all()


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
