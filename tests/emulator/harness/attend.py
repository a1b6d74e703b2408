"""Attend: attention of a few queries over a ragged cache, against NumPy in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness import oracle
from harness.cases import Placed, encode
from harness.device import Emulator, Schedule, pointer
from harness.oracle import clamp
from harness.params import AttendParams, Strided, Tuning

DIMS = (1, 3, 8, 16, 40, 64, 64, 80, 128, 128, 130, 200)
DIMS_V = (1, 5, 16, 64, 64, 100, 128, 128, 136, 300)
ROUNDING = (0.0, 2.0**-11, 2.0**-8)  # half a unit in the last place, relative: f32, f16, bf16


@dataclass
class Tensor:
    values: np.ndarray  # float64, what the bytes stand for
    placed: Placed


@dataclass
class Case:
    q: Tensor  # [batch, query heads, queries, dim]
    k: Tensor  # [1, 1, tokens, dim]
    v: Tensor
    heads: int
    types: tuple[int, int, int]  # ScoreType of q and out, k, v
    out_first: bool  # [batch, queries, query heads, dim_v] in memory
    cu_seqlens: np.ndarray
    lengths: np.ndarray
    longest: int
    causal: bool
    scale: float
    softcap: float
    sinks: tuple[np.ndarray, np.ndarray, int] | None  # bytes, the values they stand for, their type
    block: int
    pieces: int

    def rows(self, row: int) -> slice:
        tokens = self.k.values.shape[2]
        begin = clamp(self.cu_seqlens[row], 0, tokens)
        end = clamp(self.cu_seqlens[row + 1], begin, tokens)
        return slice(begin, begin + clamp(self.lengths[row], 0, min(self.longest, end - begin)))


def make_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    production = rng.random() < 0.15
    batch, heads = (1, 1) if production else (int(rng.integers(1, 4)), int(rng.integers(1, 3)))
    group, queries = one_of(1, 1, 2, 4, 5, 8), one_of(1, 1, 1, 2, 3, 7, 20)
    dim, dim_v, kind = one_of(*DIMS), one_of(*DIMS_V), int(rng.integers(3))
    types = tuple(rng.integers(3, size=3).tolist()) if rng.random() < 0.3 else (kind,) * 3
    span = rng.integers(0, one_of(3, 70, 70, 200, 500) + 1, batch * heads)
    cu_seqlens = np.concatenate([[0], np.cumsum(span)])
    tokens = int(cu_seqlens[-1] + rng.integers(0, 3))
    lengths = np.where(rng.random(span.size) < 0.5, span, rng.integers(0, span + 1))
    longest = int(max(lengths.max(), 1) if rng.random() < 0.9 else rng.integers(0, lengths.max() + 1))
    if rng.random() < 0.1:  # contents of device memory are not trusted
        cu_seqlens = rng.integers(-5, tokens + 5, span.size + 1)
        lengths = rng.choice([-1, -(2**31), 3, 2**31 - 1], span.size)

    def tensor(kind: int, *shape: int) -> Tensor:
        values = rng.standard_normal(shape).astype(np.float32)
        if rng.random() < 0.15:
            values[rng.random(shape) < 0.02] = one_of(np.inf, -np.inf, np.nan)
        data, seen = encode(values, kind)
        element = data.shape[-1]
        gap = element * one_of(0, 0, 1, 8, 64)
        data = data.reshape(*shape[:-1], shape[-1] * element)
        return Tensor(seen.astype(np.float64), Placed(data, rng.random() < 0.5, gap, element * one_of(0, 0, 1)))

    sinks = None
    if rng.random() < 0.4:
        values = rng.choice([-np.inf, -3.0, 0.0, 1.0, 100.0, np.inf, np.nan], heads * group).astype(np.float32)
        type_of_sinks = int(rng.integers(3))
        data, seen = encode(values, type_of_sinks)
        sinks = data, seen.astype(np.float64), type_of_sinks
    shapes = (batch, heads * group, queries, dim), (1, 1, tokens, dim), (1, 1, tokens, dim_v)
    q, k, v = (tensor(kind, *shape) for kind, shape in zip(types, shapes, strict=True))
    return Case(q, k, v, heads, types, rng.random() < 0.5, cu_seqlens.astype(np.int32), lengths.astype(np.int32),
                longest, causal=rng.random() < 0.6, scale=one_of(1.0, 0.3) / dim**0.5, softcap=one_of(0.0, 0.0, 2.0),
                sinks=sinks, block=0 if production else 64, pieces=one_of(0, 1, 2, 3, 100))  # fmt: skip


def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(out, mean of |v| under the same weights): what sums in float32 may err by is relative to the second."""
    batch, query_heads, queries, _dim = case.q.values.shape
    group = query_heads // case.heads
    out = np.zeros((batch, query_heads, queries, case.v.values.shape[-1]))
    size = out.copy()
    for b, head, i in np.ndindex(batch, query_heads, queries):
        rows = case.rows(b * case.heads + head // group)
        seen = rows.stop - rows.start - (queries - 1 - i if case.causal else 0)
        k, v = (t.values[0, 0, rows][: max(seen, 0)] for t in (case.k, case.v))
        logits = (k @ case.q.values[b, head, i]) * case.scale
        if case.softcap > 0:
            logits = case.softcap * np.tanh(logits / case.softcap)
        reached = ~(logits == -np.inf)  # other rows have no weight, even if they are NaN
        sink = -np.inf if case.sinks is None else case.sinks[1][head]
        if seen > 0 and np.isnan(sink):
            out[b, head, i] = np.nan
            continue
        if reached.any():
            highest = logits[reached].max()
            weights = np.exp(logits[reached] - highest)
            weights /= weights.sum() + np.exp(sink - highest)
            out[b, head, i], size[b, head, i] = weights @ v[reached], weights @ np.abs(v[reached])
    return out, size


def run(emulator: Emulator, seed: int, schedule: Schedule) -> None:
    case = make_case(seed)
    emulator.configure(schedule, Tuning(case.block, pieces=case.pieces))
    batch, query_heads, queries, dim = case.q.values.shape
    dim_v = case.v.values.shape[-1]

    def strided(placed: Placed, fill: int) -> tuple[Strided, np.ndarray]:
        memory = emulator.empty(placed.extent(), np.uint8)
        memory[:] = fill  # the bytes of a NaN
        placed.view(memory)[:] = placed.data
        return Strided(pointer(memory) + placed.lead, *placed.strides()), memory

    element = case.q.placed.data.shape[-1] // dim
    canary = np.full((batch, query_heads, queries, dim_v * element), 0x5A, np.uint8)
    wanted = Placed(canary, case.out_first, element * 3, element)
    out, memory = strided(wanted, 0x5A)
    cu_seqlens, lengths = emulator.copy(case.cu_seqlens), emulator.copy(case.lengths)
    q, k, v = (strided(t.placed, 0xFF)[0] for t in (case.q, case.k, case.v))
    sinks = None if case.sinks is None else emulator.copy(case.sinks[0])
    emulator.attend(AttendParams(batch, case.heads, query_heads // case.heads, queries, dim, dim_v, *case.types, q, out,
                                 k, v, case.k.values.shape[2], pointer(cu_seqlens), pointer(lengths), case.longest,
                                 case.causal, case.scale, case.softcap, pointer(sinks),
                                 0 if case.sinks is None else case.sinks[2]))  # fmt: skip
    emulator.synchronize()

    got = decode(np.ascontiguousarray(wanted.view(memory)), case.types[0])
    wanted.view(memory)[:] = 0x5A
    oracle.same("bytes around the output", memory, np.full_like(memory, 0x5A))
    with np.errstate(invalid="ignore", over="ignore"):
        want, size = expected(case)
        bound = 2e-5 * size + ROUNDING[case.types[0]] * np.abs(want) + 2.0**-24
        close = (np.abs(got - want) <= bound) | (np.isnan(got) & np.isnan(want)) | (got == want)
    if not close.all():
        first = tuple(np.argwhere(~close)[0])
        raise AssertionError(f"out differs, first at {first}: {got[first]} for {want[first]}")


def decode(items: np.ndarray, kind: int) -> np.ndarray:
    if kind == 2:
        return (items.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return items.view((np.float32, np.float16)[kind]).astype(np.float64)
