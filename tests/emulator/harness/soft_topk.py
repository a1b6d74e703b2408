"""Soft top-k and its gradient: masks against bisection in float64, gradients against their formulas on these masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness import oracle
from harness.attend import decode
from harness.cases import encode, score_values
from harness.device import Emulator, Schedule, pointer
from harness.params import RowNumbers, SoftRows, SoftTopkGradParams, SoftTopkParams, Tuning

KINDS = ("normal", "normal", "normal", "ties", "constant", "minus_infinity", "hostile", "ascending")
LOG_FLOOR, LEAST_WEIGHT = -1e4, 1e-6
DTYPES = {np.float32: 0, np.float64: 1, np.int32: 2, np.int64: 3}  # as Number counts
ROUNDING = (2.0**-24, 2.0**-11, 2.0**-8)


@dataclass
class Case:
    sizes: tuple[int, ...]  # four axes, then n
    scores: np.ndarray  # what the bytes stand for
    data: np.ndarray  # bytes [..., n, element]
    type: int
    gap: int  # elements between rows
    k: np.ndarray  # each broadcasts to the four axes
    temperature: np.ndarray
    lengths: np.ndarray | None
    log: bool
    upstream: np.ndarray
    wants: tuple[bool, bool]  # the gradients of scores and of the temperature
    tuning: Tuning


def make_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    production = rng.random() < 0.15
    axes = tuple(int(x) for x in rng.choice([1, 1, 2, 3], 4)) if not production else (1, 1, 1, 2)
    n = int(one_of(1, 2, 31, 64, 65, 130, 257, 300, 700) if not production else one_of(5, 1025, 2048))
    kind = int(rng.integers(3))
    scores = score_values(rng, one_of(*KINDS), (*axes, n))
    data, seen = encode(scores, kind)

    def numbers(values: np.ndarray, dtype: type) -> np.ndarray:
        cut = tuple(slice(None) if rng.random() < 0.6 else slice(1) for _ in axes)
        return values[cut].astype(dtype)

    temperature = numbers(rng.choice([0.05, 0.3, 1.0], axes), one_of(np.float32, np.float64))
    k = rng.random(axes) * n * one_of(1, 1, 0.1) + 0.013
    k[rng.random(axes) < 0.1] = one_of(0.0, -2.0, n, 2.0 * n, np.nan)
    lengths = None
    if rng.random() < 0.5:
        lengths = rng.integers(0, n + 1, axes)
        lengths[rng.random(axes) < 0.2] = one_of(-3, n, 2**31 - 1)
        lengths = numbers(lengths, one_of(np.int32, np.int64))
    tuning = Tuning(0 if production else 64, cluster=one_of(0, 0, 1, 2, 4), resident=one_of(-1, -1, 0, 40))
    return Case((*axes, n), seen.astype(np.float64), data, kind, one_of(0, 0, 3), numbers(k, np.float32), temperature,
                lengths, rng.random() < 0.5, rng.standard_normal((*axes, n)).astype(np.float32),
                (rng.random() < 0.8, rng.random() < 0.6), tuning)  # fmt: skip


def row_mask(scores: np.ndarray, k: float, temperature: float, log: bool) -> tuple[np.ndarray, float]:
    """(mask, weight) of one row without what lies behind its length."""
    there, infinite = scores > -np.inf, scores == np.inf
    finite = there & ~infinite
    none, every, missing = (LOG_FLOOR, 0.0, -np.inf) if log else (0.0, 1.0, 0.0)
    mask = np.where(infinite, every, np.where(there, none, missing))
    kept, count = k - infinite.sum(), finite.sum()
    if not 0 < kept < count:
        mask[finite] = every if kept >= count and k > infinite.sum() else none
        return mask, 0.0
    s = scores[finite]
    offset = temperature * np.log(kept / (count - kept))
    low, high = s.min() - offset, s.max() - offset
    for _ in range(200):
        tau = (low + high) / 2
        if (1 / (1 + np.exp(-(s - tau) / temperature))).sum() > kept:
            low = tau
        else:
            high = tau
    u = (s - tau) / temperature
    mask[finite] = -np.logaddexp(0, -u) if log else 1 / (1 + np.exp(-u))
    return mask, max((np.exp(-np.logaddexp(0, u) - np.logaddexp(0, -u))).sum(), LEAST_WEIGHT * count)


def gradients(mask: np.ndarray, weight: float, upstream: np.ndarray, temperature: float, log: bool) -> tuple:
    """(of scores, of k, of the temperature) for one row."""
    if weight == 0:
        return np.zeros_like(mask), 0.0, 0.0
    m, rest = (np.exp(mask), -np.expm1(mask)) if log else (mask, 1 - mask)
    w = m * rest
    a = np.where(mask == -np.inf, 0, upstream * rest) if log else upstream * w
    inside = (m > 0) & (rest > 0)
    u = np.where(inside, (mask if log else np.log(np.where(inside, m, 1))) - np.log(np.where(inside, rest, 1)), 0)
    if log:
        u = np.where((mask > -np.inf) & (rest > 0), mask - np.log(np.where(rest > 0, rest, 1)), 0)
    mean = a.sum() / weight
    return (a - w * mean) / temperature, mean, ((w * u).sum() * mean - (a * u).sum()) / temperature


def close(what: str, got: np.ndarray, want: np.ndarray, bound: np.ndarray | float) -> None:
    good = (np.abs(got - want) <= bound) | (got == want)
    if not np.all(good):
        first = tuple(np.argwhere(~np.broadcast_to(good, np.shape(got)))[0])
        raise AssertionError(f"{what} differs, first at {first}: {got[first]} for {want[first]}")


def run(emulator: Emulator, seed: int, schedule: Schedule) -> None:
    case = make_case(seed)
    emulator.configure(schedule, case.tuning)
    *axes, n = case.sizes
    rows, element = int(np.prod(axes)), case.data.shape[-1]

    def per_row(values: np.ndarray | None, fallback: float) -> RowNumbers:
        if values is None:
            return RowNumbers(None, (0, 0, 0, 0), fallback, 3)
        memory = emulator.copy(values)
        steps = [s // values.itemsize if size > 1 else 0
                 for size, s in zip(values.shape, np.ascontiguousarray(values).strides, strict=True)]  # fmt: skip
        return RowNumbers(pointer(memory), tuple(steps), 0.0, DTYPES[values.dtype.type])

    pitch = (n + case.gap) * element
    memory = emulator.empty(max(rows * pitch - case.gap * element, 0), np.uint8)
    for row, data in enumerate(case.data.reshape(rows, n * element)):
        memory[row * pitch : row * pitch + n * element] = data
    strides = [int(np.prod(axes[i + 1 :])) * pitch for i in range(4)]
    mask, weights = emulator.empty(rows * n, np.float32), emulator.empty(rows, np.float32)
    soft_rows = SoftRows(tuple(axes), n, per_row(case.k, 0.0), per_row(case.temperature, 0.0),
                         per_row(case.lengths, float(n)), case.type, False, case.log)  # fmt: skip
    emulator.soft_topk(SoftTopkParams(soft_rows, pointer(memory), tuple(strides), pointer(mask), pointer(weights)))
    emulator.synchronize()

    grad = emulator.copy(case.upstream)
    to_scores, to_temperature = case.wants
    out = emulator.empty(rows * n * element if to_scores else 0, np.uint8)
    of_k, of_t = emulator.empty(rows, np.float32), emulator.empty(rows if to_temperature else 0, np.float32)
    emulator.soft_topk_grad(SoftTopkGradParams(soft_rows, pointer(grad), pointer(mask), pointer(weights),
                                               pointer(out) if to_scores else None, pointer(of_k),
                                               pointer(of_t) if to_temperature else None))  # fmt: skip
    emulator.synchronize()

    def spread(values: np.ndarray | None, fallback: float) -> np.ndarray:
        return np.broadcast_to(fallback if values is None else values, axes).reshape(rows)

    ks, ts, lengths = spread(case.k, 0), spread(case.temperature, 0), spread(case.lengths, n)
    scores, upstream = case.scores.reshape(rows, n), case.upstream.reshape(rows, n).astype(np.float64)
    for row in range(rows):
        length, temperature = oracle.clamp(int(lengths[row]), 0, n), max(float(ts[row]), 1e-6)
        mine = mask[row * n : (row + 1) * n].astype(np.float64)
        with np.errstate(all="ignore"):
            want, weight = row_mask(scores[row, :length], float(ks[row]), temperature, case.log)
            behind = np.full(n - length, -np.inf if case.log else 0.0)
            want = np.concatenate([want, behind])
            size = np.where(np.isinf(want), 0, np.abs(want)) if case.log else 0.0
            close(f"mask of row {row}", mine, want, 5e-5 * (1 + size))
            close(f"weight of row {row}", weights[row], np.float64(weight), 1e-3 * weight + 1e-5)
            g = gradients(mine[:length], float(weights[row]), upstream[row, :length], temperature, case.log)
        scale = np.abs(upstream[row]).sum()
        close(f"gradient of k of row {row}", of_k[row], np.float64(g[1]), 1e-5 * scale + 1e-4 * abs(g[1]))
        if to_temperature:
            bound = (1e-4 * scale * (1 + abs(g[1])) + 1e-4 * abs(g[2])) / temperature
            close(f"gradient of the temperature of row {row}", of_t[row], np.float64(g[2]), bound)
        if to_scores:
            got = decode(out.reshape(rows, n, element)[row].reshape(-1), case.type)
            wanted = np.concatenate([g[0], np.zeros(n - length)])
            bound = ROUNDING[case.type] * np.abs(wanted) + 1e-5 * (1 + abs(g[1])) * (1 + scale / n) / temperature
            close(f"gradient of the scores of row {row}", got, wanted, bound)
