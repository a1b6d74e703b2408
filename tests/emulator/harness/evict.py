"""The launchers of an eviction on one case: spans, select, gather behind it, compact, and positions no select wrote."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from harness import oracle
from harness.cases import Case, Placed, make_case
from harness.device import Emulator, Schedule, pointer
from harness.params import (
    CompactParams,
    GatherParams,
    RowInts,
    SelectParams,
    Source,
    SpansParams,
    Strided,
    Tuning,
)


class Run:
    """One case on the device: spans, select and gather on one stream, then compact of a copy."""

    def __init__(self, emulator: Emulator, case: Case, schedule: Schedule) -> None:
        self.emulator, self.case = emulator, case
        cluster = min(case.cluster, 1) if schedule.code < 90 else case.cluster
        tuning = Tuning(
            case.block, cluster, case.splits, case.resident_keys, case.registers, tables=-1 if case.shared_tables else 0
        )
        emulator.configure(schedule, tuning)

    def table(self, values: np.ndarray) -> np.ndarray:
        if not self.case.by_upload:
            return self.emulator.copy(values)
        memory = self.emulator.empty(values.size, values.dtype)
        self.emulator.upload(np.ascontiguousarray(values), memory)
        return memory

    def ints(self, values: np.ndarray | None) -> RowInts:
        if values is None or (values.size == 1 and not self.case.by_upload):
            return RowInts(None, 0, 0, 0, 0 if values is None else int(values.flat[0]), False)
        memory = self.table(values.astype(np.int64 if self.case.wide else np.int32))
        steps = [s // values.itemsize if n > 1 else 0 for n, s in zip(values.shape, values.strides, strict=True)]
        return RowInts(pointer(memory), *steps, 0, self.case.wide)

    def strided(self, tensor: Placed, fill: int) -> tuple[Strided, np.ndarray]:
        """The tensor in memory that ends with its last byte, and the view of its logical bytes there."""
        memory = self.emulator.empty(tensor.extent(), np.uint8)
        memory[:] = fill
        view = tensor.view(memory)
        view[:] = tensor.data
        batch, head, token = (0, 0, tensor.strides()[2]) if self.ragged else tensor.strides()
        return Strided(pointer(memory) + tensor.lead, batch, head, token), view

    @property
    def ragged(self) -> bool:
        return self.case.segments.cu_seqlens is not None

    def source(self, ragged_by: np.ndarray | None) -> Source:
        segments = self.case.segments
        tokens = self.table(np.array(segments.tokens, np.int64))
        cu = None if ragged_by is None else self.table(ragged_by)
        return Source(segments.layers, segments.batch, segments.heads, pointer(tokens), pointer(cu),
                      self.ints(segments.lengths), self.ints(segments.starts))  # fmt: skip

    def run(self) -> None:
        case, emulator, segments, layout = self.case, self.emulator, self.case.segments, self.case.layout
        want = oracle.spans(segments, layout)
        source = self.source(segments.cu_seqlens)
        lengths, cu_seqlens = emulator.empty(segments.count, np.int32), emulator.empty(segments.count + 1, np.int32)
        # What a call with other budgets has left at the same addresses: a stale load finds it.
        before = oracle.spans(replace(segments, budgets=segments.budgets[..., ::-1] // 2), layout)
        lengths[:], cu_seqlens[:] = before.lengths, before.cu_seqlens
        overflow, ready = emulator.empty(1, np.int32), emulator.empty(segments.count, np.uint32)
        # The tokens of the layers travel with the spans, which read them, and other bytes behind them.
        others = np.random.default_rng(segments.count).integers(0, 256, segments.count * 37, dtype=np.uint8)
        tables = np.concatenate([np.array(segments.tokens, np.int64).view(np.uint8), others])
        uploaded = emulator.empty(tables.size, np.uint8)
        source.tokens = pointer(uploaded)
        emulator.spans(SpansParams(source, self.ints(segments.budgets), layout.max_budget, layout.page, layout.reserve,
                                   layout.align, layout.padded, layout.total, pointer(lengths), pointer(cu_seqlens),
                                   pointer(overflow), pointer(ready)), tables, uploaded)  # fmt: skip

        select, longest, positions = self.select(source, lengths, cu_seqlens, ready)
        gather, out = self.gather(source, positions, cu_seqlens, ready if case.behind_select else None)
        if case.behind_select:
            emulator.evict(select, gather, longest)
            # The next work on the stream may use the select's memory again.
            emulator.upload(np.full(segments.count, 7, np.uint32), ready)
        else:
            emulator.select(select, longest)
            emulator.gather(gather, False)
        moved = [[self.strided(layer, fill=0x5A) for layer in payload] for payload in case.payloads]
        buffers = emulator.structs([one for payload in moved for one, _ in payload])
        row_bytes = self.table(np.array(self.sizes, np.int64))
        filled = emulator.empty(layout.total if layout.any_order else 0, np.int32)
        emulator.compact(CompactParams(source, None, layout.to_back, layout.total, len(self.sizes), pointer(buffers),
                                       pointer(row_bytes), pointer(positions), pointer(lengths), pointer(cu_seqlens),
                                       pointer(filled) if layout.any_order else None))  # fmt: skip
        emulator.synchronize()

        oracle.same("bytes uploaded with the spans", uploaded, tables)
        oracle.same("lengths", lengths, want.lengths)
        oracle.same("cu_seqlens", cu_seqlens, want.cu_seqlens)
        oracle.same("overflow", overflow[0], want.overflow)
        chosen = oracle.select(segments, case.score_values, case.sink, case.window, want, layout.total)
        oracle.same("positions", positions, chosen)
        oracle.same("ready", ready, np.full(segments.count, 7 if case.behind_select else 1))
        for i, payload in enumerate(case.payloads):
            data = [layer.data for layer in payload]
            oracle.same(f"gathered {i}", out[i], oracle.gather(segments, data, chosen, want.cu_seqlens))
            compacted, there = oracle.compact(segments, data, chosen, want, layout)
            for got, right in zip(moved[i], compacted, strict=True):
                oracle.same(f"compacted {i}", got[1], right)
            if layout.any_order:
                oracle.same("positions in any order", filled, there)

    def run_hostile(self, rng: np.random.Generator) -> None:
        """Positions, lengths and offsets that no select wrote: reads and writes stay inside of the tensors."""
        case, emulator, segments, total = self.case, self.emulator, self.case.segments, self.case.layout.total
        source = self.source(segments.cu_seqlens)
        positions = rng.integers(-4, max(segments.tokens) + 4, total).astype(np.int32)
        cu_seqlens = np.sort(rng.integers(0, total + 1, segments.count + 1)).astype(np.int32)
        gather, out = self.gather(source, emulator.copy(positions), emulator.copy(cu_seqlens), None)
        emulator.gather(gather, False)
        wild = rng.choice([-(2**31), -1, 0, 3, total, 2**31 - 1], 2 * segments.count + 1).astype(np.int32)
        anywhere, lengths = emulator.copy(wild[segments.count :]), emulator.copy(wild[: segments.count])
        source = self.source(wild[segments.count :] if self.ragged else None)
        select, longest, _ = self.select(source, lengths, anywhere, None)
        gather, _ = self.gather(source, emulator.copy(positions), anywhere, None)
        emulator.select(select, longest)
        emulator.gather(gather, False)
        emulator.synchronize()
        for i, payload in enumerate(case.payloads):
            data = [layer.data for layer in payload]
            oracle.same(f"gathered {i} by any positions", out[i], oracle.gather(segments, data, positions, cu_seqlens))

    def select(
        self, source: Source, lengths: np.ndarray, cu_seqlens: np.ndarray, ready: np.ndarray | None
    ) -> tuple[SelectParams, int, np.ndarray]:
        case, segments = self.case, self.case.segments
        # Gaps have high scores: a kernel that reads them selects other rows.
        scores = self.emulator.structs([self.strided(layer, fill=0x7B)[0] for layer in case.scores])
        positions = self.emulator.empty(case.layout.total, np.int32)
        longest = max((segments.valid(row)[1] for row in range(segments.count)), default=0)
        select = SelectParams(source, pointer(scores), case.score_type, case.sink, case.window, pointer(lengths),
                              pointer(cu_seqlens), case.layout.total, pointer(positions), pointer(ready))  # fmt: skip
        return select, longest, positions

    def gather(
        self, source: Source, positions: np.ndarray, cu_seqlens: np.ndarray, ready: np.ndarray | None
    ) -> tuple[GatherParams, list[np.ndarray]]:
        total = self.case.layout.total
        placed = [[self.strided(layer, fill=0x5A) for layer in payload] for payload in self.case.payloads]
        out = [self.emulator.empty(total * size, np.uint8) for size in self.sizes]
        strides = b"".join(bytes(one) for payload in placed for one, _ in payload)
        numbers = np.array([*map(pointer, out), *self.sizes], np.int64)
        tables = pointer(self.table(np.concatenate([np.frombuffer(strides, np.int64), numbers])))
        outputs = tables + len(strides)
        gather = GatherParams(source, len(out), tables, outputs, outputs + 8 * len(out), pointer(positions),
                              pointer(cu_seqlens), total, pointer(ready), False)  # fmt: skip
        return gather, [o.reshape(total, size) for o, size in zip(out, self.sizes, strict=True)]

    @property
    def sizes(self) -> list[int]:
        return [payload[0].data.shape[-1] for payload in self.case.payloads]


def check_upload(emulator: Emulator) -> None:
    for size in (1, 15, 16, 17, 3839, 3840, 3841, 10000):
        for lead in (0, 1, 4, 16):
            host = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
            memory = emulator.empty(lead + size, np.uint8)
            before = memory[:lead].copy()
            emulator.upload(host, memory[lead:])
            kept, host[:] = host.copy(), 0
            emulator.synchronize()
            oracle.same(f"{size} bytes uploaded", memory, np.concatenate([before, kept]))


def check_no_segments(emulator: Emulator) -> None:
    """All of the output is slack, and no select is in front of the gather."""
    total, size = 70, 16
    none = RowInts(None, 0, 0, 0, 0, False)
    source = Source(1, 0, 3, pointer(emulator.copy(np.array([5]))), None, none, none)
    cu_seqlens, positions = emulator.copy(np.zeros(1, np.int32)), emulator.empty(total, np.int32)
    out, ready = emulator.empty(total * size, np.uint8), emulator.empty(1, np.uint32)
    inputs, outputs = emulator.empty(32, np.uint8), emulator.copy(np.array([pointer(out)], np.uint64))
    select = SelectParams(source, None, 0, 0, 0, pointer(emulator.empty(0, np.int32)), pointer(cu_seqlens), total,
                          pointer(positions), pointer(ready))  # fmt: skip
    gather = GatherParams(source, 1, pointer(inputs), pointer(outputs), pointer(emulator.copy(np.array([size]))),
                          pointer(positions), pointer(cu_seqlens), total, pointer(ready), False)  # fmt: skip
    emulator.evict(select, gather, 0)
    emulator.synchronize()
    oracle.same("positions of no segments", positions, np.full(total, -1))
    oracle.same("rows of no segments", out, np.zeros(out.size))


def check_words_of_an_old_driver(emulator: Emulator) -> None:
    words = emulator.describe(35)  # cudaErrorInsufficientDriver
    if "driver is older" not in words or "build_info()" not in words:
        raise AssertionError(f"an old driver is called {words!r}")


def check_questions(emulator: Emulator, seed: int, schedule: Schedule) -> None:
    """A call like an earlier one queries the device no more."""
    for _ in range(2):
        before = emulator.questions()
        Run(emulator, make_case(seed), schedule).run()
    oracle.same("questions of a second call", emulator.questions(), before)


def run(emulator: Emulator, seed: int, schedule: Schedule) -> None:
    case = make_case(seed)
    Run(emulator, case, schedule).run()
    Run(emulator, case, schedule).run_hostile(np.random.default_rng(seed))
