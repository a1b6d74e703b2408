"""Means with paired bootstrap intervals (Efron and Tibshirani, 1993)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean, and the range that holds 95 % of the means of resampled samples."""

    mean: float
    low: float
    high: float


def interval(
    scores: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray | None = None, seed: int = 0
) -> Interval:
    """
    Args:
        counts: where a sample is a sum over so many things, all of which weigh the same: a mean is the sum of the
            scores over that of the counts, and a sample is drawn with all that it has.
    """
    values = np.asarray(scores, dtype=np.float64)
    each = np.ones(len(values)) if counts is None else np.asarray(counts, dtype=np.float64)
    low, high = np.quantile(_resampled(values, each, seed), (0.025, 0.975))
    return Interval(float(values.sum() / each.sum()), float(low), float(high))


def difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Interval:
    """The same for two methods on the same samples: a sample is drawn with both of its scores."""
    return interval(np.subtract(first, second, dtype=np.float64), seed=seed)


def _resampled(values: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """The mean of each resampled set."""
    sums = np.stack([values, counts])
    means = [np.divide(*(sums @ times.astype(np.float64).T)) for times in _times_drawn(len(values), seed)]
    return np.concatenate(means)


@lru_cache(maxsize=32)
def _times_drawn(count: int, seed: int) -> list[np.ndarray]:
    """How often each of `count` samples is in a resampled set, uint16 `[500, count]` for 500 sets at a time."""
    rng = np.random.default_rng(seed)
    rows = np.arange(500)[:, None] * count
    draws = (rng.integers(0, count, (500, count)) for _ in range(0, DRAWS, 500))
    return [np.bincount((x + rows).ravel(), minlength=500 * count).reshape(500, count).astype(np.uint16) for x in draws]
