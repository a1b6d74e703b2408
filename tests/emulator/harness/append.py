"""Append: rows at the end of every segment of a ragged cache, as far as its span goes, against NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness import oracle
from harness.cases import ROW_BYTES, Placed
from harness.device import Emulator, Schedule, pointer
from harness.oracle import clamp
from harness.params import AppendParams, RowInts, Strided, Tuning


@dataclass
class Case:
    valid: np.ndarray | None  # [batch, heads], either broadcast
    wide: bool
    inputs: list[Placed]
    cache: list[np.ndarray]  # bytes [tokens, row_bytes]
    cu_seqlens: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray
    position: int
    block: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.inputs[0].data.shape[:3]


def make_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    batch, heads = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    count = int(rng.choice([0, 1, 1, 1, 2, 7, 70, 300]))
    rows, production = batch * heads, rng.random() < 0.2
    span = rng.integers(0, 2 * count + 4, rows)
    cu_seqlens = np.concatenate([[0], np.cumsum(span)]).astype(np.int32)
    tokens = int(cu_seqlens[-1] + rng.integers(0, 3))
    lengths = rng.integers(0, span + 1).astype(np.int32)
    if rng.random() < 0.2:  # contents of device memory are not trusted; spans still ascend, or rows would overlap
        cu_seqlens[0], cu_seqlens[-1] = rng.choice([0, -5]), rng.choice([tokens, 2**31 - 1])
        lengths[rng.random(rows) < 0.3] = rng.choice([-1, -(2**31), 2**31 - 1])
    valid, wide = None, rng.random() < 0.5
    if rng.random() < 0.6:
        shape = tuple(n if rng.random() < 0.7 else 1 for n in (batch, heads))
        valid = rng.integers(-1, count + 2, shape).astype(np.int64 if wide else np.int32)
    inputs = []
    for _ in range(rng.integers(1, 5)):
        size, transposed = int(rng.choice(ROW_BYTES)), rng.random() < 0.5
        gap, lead = int(rng.choice([0, 0, size, 1, 4])), int(rng.choice([0, 0, 2, 8]))
        inputs.append(Placed(rng.integers(1, 256, (batch, heads, count, size), dtype=np.uint8), transposed, gap, lead))
    cache = [rng.integers(1, 256, (tokens, one.data.shape[-1]), dtype=np.uint8) for one in inputs]
    positions = rng.integers(-1, 100, tokens).astype(np.int32)
    return Case(valid, wide, inputs, cache, cu_seqlens, lengths, positions, int(rng.integers(0, 2**20)),
                block=0 if production else 64)  # fmt: skip


def expected(case: Case) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """(cache, lengths, positions) afterwards; what is not written stays as it was."""
    cache, lengths, positions = [c.copy() for c in case.cache], case.lengths.copy(), case.positions.copy()
    batch, heads, count = case.sizes
    tokens = positions.size
    valid = np.broadcast_to(count if case.valid is None else case.valid, (batch, heads))
    for row in range(batch * heads):
        b, h = divmod(row, heads)
        begin = clamp(case.cu_seqlens[row], 0, tokens)
        end = clamp(case.cu_seqlens[row + 1], begin, tokens)
        length = clamp(case.lengths[row], 0, end - begin)
        new = range(count - clamp(valid[b, h], 0, count), count)
        for i, token in enumerate(new[: end - begin - length]):
            for rows, one in zip(cache, case.inputs, strict=True):
                rows[begin + length + i] = one.data[b, h, token]
            positions[begin + length + i] = case.position + token
        lengths[row] = min(length + len(new), end - begin)
    return cache, lengths, positions


def run(emulator: Emulator, seed: int, schedule: Schedule) -> None:
    case = make_case(seed)
    emulator.configure(schedule, Tuning(case.block))
    batch, heads, count = case.sizes
    valid = RowInts(None, 0, 0, 0, count, False)
    if case.valid is not None:
        memory = emulator.copy(case.valid)
        steps = [s // memory.itemsize if n > 1 else 0
                 for n, s in zip(case.valid.shape, case.valid.strides, strict=True)]  # fmt: skip
        valid = RowInts(pointer(memory), 0, *steps, 0, case.wide)
    inputs = []
    for one in case.inputs:
        memory = emulator.empty(one.extent(), np.uint8)
        one.view(memory)[:] = one.data
        inputs.append(Strided(pointer(memory) + one.lead, *one.strides()))
    cache = [emulator.copy(rows) for rows in case.cache]
    table, outputs = emulator.structs(inputs), emulator.copy(np.array([pointer(c) for c in cache], np.uint64))
    row_bytes = emulator.copy(np.array([c.shape[1] for c in case.cache], np.int64))
    cu_seqlens, lengths = emulator.copy(case.cu_seqlens), emulator.copy(case.lengths)
    positions = emulator.copy(case.positions)
    emulator.append(AppendParams(batch, heads, count, valid, len(inputs), pointer(table), pointer(outputs),
                                 pointer(row_bytes), positions.size, pointer(cu_seqlens), pointer(lengths),
                                 pointer(positions), case.position))  # fmt: skip
    emulator.synchronize()

    want = expected(case)
    oracle.same("lengths", lengths, want[1])
    oracle.same("positions", positions, want[2])
    for i, (got, rows) in enumerate(zip(cache, want[0], strict=True)):
        oracle.same(f"cache {i}", got.reshape(rows.shape), rows)
