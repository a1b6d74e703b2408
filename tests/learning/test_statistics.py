"""Bootstrap intervals against what they are drawn from: the exact distribution of a resampled mean, and its limit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lkv.evaluate import statistics
from lkv.evaluate.statistics import DRAWS, difference, interval

EXACT = st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 2 / 3, 1.0]), min_size=1, max_size=5)


def exact_means(scores: list[float]) -> np.ndarray:
    """The means of all n^n ways to draw, each as likely as the others."""
    return np.array([np.mean(drawn) for drawn in product(scores, repeat=len(scores))])


def between(means: np.ndarray, quantile: float) -> tuple[float, float]:
    """Where a quantile of `DRAWS` draws lies: that of their exact distribution, four deviations to either side."""
    off = 4 * (quantile * (1 - quantile) / DRAWS) ** 0.5
    low, high = np.quantile(means, [max(0, quantile - off), min(1, quantile + off)], method="inverted_cdf")
    return low - 1e-12, high + 1e-12


@settings(max_examples=30)
@given(EXACT)
def test_ends_are_the_quantiles_of_all_ways_to_draw(scores: list[float]) -> None:
    got, means = interval(scores), exact_means(scores)
    for end, quantile in ((got.low, 0.025), (got.high, 0.975)):
        least, most = between(means, quantile)
        assert least <= end <= most
    assert got.mean == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([1], 1, 1),
        ([0, 1], 0, 1),  # each with a probability of 1/4
        ([0, 0, 1], 0, 1),  # 1 has 1/27, which is 3.7 %: within 2.5 %, and no more within 5 %
        ([0, 1, 1], 0, 1),
        ([0, 0, 0, 1], 0, 0.75),  # 3/4 has 4.7 %, 1 has 0.4 %: not within 0.5 %
        ([0, 1, 1, 1], 0.25, 1),
        ([0, 0, 0, 0, 0, 1], 0, 0.5),  # 3 or more of 6 have 6.2 %, 4 or more 0.9 %
    ],
)
def test_few_samples_by_hand(scores: list[int], low: float, high: float) -> None:
    got = interval(scores)
    assert (got.low, got.high) == (low, high)


@pytest.mark.parametrize(("right", "count"), [(280, 400), (50, 1000), (700, 1400)])
def test_many_samples_are_normal(right: int, count: int) -> None:
    """The mean of n answers, a share p of them right, has the deviation sqrt(p (1 - p) / n)."""
    p = right / count
    half = 1.959964 * (p * (1 - p) / count) ** 0.5
    got = interval([1] * right + [0] * (count - right))
    assert got.mean == pytest.approx(p)
    # Half a step of 1 / n, and four deviations of a quantile of 10 000 draws: that of its probability, over the normal
    # density at 1.96 (0.0584), in deviations of the mean.
    off = 0.5 / count + 4 * (0.025 * 0.975 / DRAWS) ** 0.5 / 0.0584 * half / 1.959964
    assert got.low == pytest.approx(p - half, abs=off)
    assert got.high == pytest.approx(p + half, abs=off)


def test_values_between_0_and_1_count_as_they_are() -> None:
    values = np.random.default_rng(3).random(300)
    got, half = interval(values), 1.959964 * values.std() / 300**0.5
    assert got.high - got.low == pytest.approx(2 * half, rel=0.05)
    assert (got.low + got.high) / 2 == pytest.approx(values.mean(), abs=0.05 * half)


def test_interval_does_not_depend_on_the_scale() -> None:
    values = np.random.default_rng(4).random(40)
    one, other = interval(values), interval(3 + 10 * values)
    assert [other.mean, other.low, other.high] == pytest.approx([3 + 10 * x for x in (one.mean, one.low, one.high)])


def test_scores_of_less_precision_are_averaged_in_float64() -> None:
    """2**24 + 1 is no number of float32."""
    assert interval(np.array([2**24, 2, 0], np.float32)).mean == (2**24 + 2) / 3


def test_seed_decides() -> None:
    values = np.random.default_rng(5).random(50)
    assert interval(values) == interval(values) == interval(values, seed=0)
    others = {interval(values, seed=seed) for seed in range(5)}
    assert len(others) == 5
    assert difference(values, values[::-1], seed=7) == interval(values - values[::-1], seed=7)
    assert difference(values, values[::-1]) != difference(values, values[::-1], seed=7)


def test_all_draws_are_different_ones() -> None:
    means = statistics._resampled(np.random.default_rng(6).random(50), np.ones(50), 0)
    assert len(means) == len(np.unique(means)) == DRAWS == 10_000


class TestDifference:
    def test_is_first_minus_second(self) -> None:
        got = difference([1, 1, 1, 0.5], [0, 0, 0, 0])
        assert got.mean == pytest.approx(0.875) and got.low > 0.5

    def test_of_paired_samples_is_exact_where_they_differ_by_the_same(self) -> None:
        """Both scores of a sample are drawn together, so that what they have in common has no spread."""
        first = np.random.default_rng(8).random(60)
        got = difference(first, first - 0.2)
        assert [got.mean, got.low, got.high] == pytest.approx([0.2] * 3)
        assert interval(first).high - interval(first).low > 0.1

    def test_of_unpaired_ones_is_not(self) -> None:
        first = np.random.default_rng(8).random(60)
        got = difference(first, np.sort(first) - 0.2)
        assert got.mean == pytest.approx(0.2) and got.high - got.low > 0.1

    def test_is_sharper_than_two_intervals(self) -> None:
        first = (np.random.default_rng(1).random(300) < 0.6).astype(np.float64)
        second = first.copy()
        second[np.flatnonzero(first)[:9]] = 0  # worse on three samples in a hundred, better on none
        ahead = difference(first, second)
        assert ahead.mean == pytest.approx(0.03)
        assert 0 < ahead.low < ahead.mean < ahead.high
        assert interval(first).low < interval(second).mean
