"""Eviction in place, dense and in pages, of positions that the harness chooses: random cases and their oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness import oracle
from harness.cases import ALIGNED_ROW_BYTES, ROW_BYTES
from harness.device import Emulator, Schedule, pointer
from harness.params import CompactParams, Pages, RowInts, Source, Strided, Tuning


@dataclass
class Pool:
    """Rows [pages, heads, page, row_bytes] of one payload of one layer; one head where every head has its own pages."""

    data: np.ndarray
    rows_first: bool  # [pages, page, heads, row_bytes] in memory
    gap: int  # bytes between the rows
    lead: int

    def strides(self) -> tuple[int, int, int]:
        _, heads, page, size = self.data.shape
        pitch = size + self.gap
        return heads * page * pitch, *((pitch, heads * pitch) if self.rows_first else (page * pitch, pitch))


@dataclass
class Case:
    shape: tuple[int, int, int]  # layers, batch, heads
    tokens: int
    page: int
    per_head: bool
    to_back: bool
    lengths: np.ndarray  # [batch, heads], for all layers
    tables: np.ndarray  # [batch, heads or 1, M]
    kept: list[np.ndarray]  # positions of each segment
    pools: list[list[Pool]]  # [payload][layer]
    block: int


def make_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    block = one_of(64, 64, 64, 0)
    layers, batch, heads = (int(rng.integers(1, 4)) for _ in range(3))
    page, tokens = one_of(1, 2, 4, 16, 64), one_of(1, 5, 31, 130, 400)
    if block == 0:  # blocks of production size take few and long segments
        layers, batch, heads, tokens = 1, 1, int(rng.integers(1, 3)), one_of(130, 400, 1500)
    per_head, to_back = rng.random() < 0.5, rng.random() < 0.5
    lengths = rng.integers(0, tokens + 1, (batch, heads))
    most = -(-tokens // page) + one_of(0, 2)
    owners = heads if per_head else 1
    used = -(-(lengths if per_head else lengths.max(1, keepdims=True)) // page)
    count = int(used.sum()) + one_of(0, 3)
    ids = rng.permutation(count)
    tables = np.full((batch, owners, most), one_of(-1, 2**31 - 1, count))  # what is behind the used pages is not read
    for b in range(batch):
        for h in range(owners):
            mine, ids = ids[: used[b, h]], ids[used[b, h] :]
            tables[b, h, : mine.size] = mine
    share = one_of(0.1, 0.5, 0.5, 0.9, 1.0)
    kept = []
    for row in range(layers * batch * heads):
        length = lengths[row // heads % batch, row % heads]
        chosen = np.flatnonzero(rng.random(length) < share * rng.random() * 2)
        if to_back:  # whole pages are dropped
            others = np.setdiff1d(np.arange(length), chosen)
            chosen = np.sort(np.concatenate([chosen, others[: (length - chosen.size) % page]]))
        kept.append(chosen)
    pools = []
    for _ in range(one_of(1, 2, 2, 3)):
        size, rows_first = one_of(*(ALIGNED_ROW_BYTES if block == 0 else (*ROW_BYTES, 320, 1024))), rng.random() < 0.5
        gap, lead = one_of((0, 0), (16, 0), (0, 8), (1, 1), (size, 2))
        pools.append([Pool(rng.integers(1, 256, (count, heads // owners, page, size), dtype=np.uint8), rows_first, gap,
                           lead) for _ in range(layers)])  # fmt: skip
    return Case((layers, batch, heads), tokens, page, per_head, to_back, lengths, tables, kept, pools, block)


class Run:
    def __init__(self, emulator: Emulator, case: Case, schedule: Schedule, seed: int) -> None:
        self.emulator, self.case, self.seed = emulator, case, seed
        emulator.configure(schedule, Tuning(case.block))

    def source(self, lengths: np.ndarray) -> Source:
        layers, batch, heads = self.case.shape
        tokens = self.emulator.copy(np.full(layers, self.case.tokens))
        ints = RowInts(pointer(self.emulator.copy(lengths.astype(np.int32))), 0, heads, 1, 0, False)
        return Source(layers, batch, heads, pointer(tokens), None, ints, RowInts(None, 0, 0, 0, 0, False))

    def placed(self, pool: Pool) -> tuple[Strided, np.ndarray]:
        """The pool in memory that ends with its last byte, and the view of its bytes there."""
        strides = pool.strides()
        extent = sum((n - 1) * s for n, s in zip(pool.data.shape, strides, strict=False)) + pool.data.shape[-1]
        memory = self.emulator.empty(pool.lead + (extent if pool.data.size else 0), np.uint8)
        memory[:] = 0x5A
        view = np.lib.stride_tricks.as_strided(memory[pool.lead :], pool.data.shape, (*strides, 1))
        view[:] = pool.data
        head = 0 if self.case.per_head else strides[1]
        return Strided(pointer(memory) + pool.lead, strides[0], head, strides[2]), view

    def pages(self, tables: np.ndarray, count: int) -> Pages:
        case, wide = self.case, self.seed % 2 == 1
        memory = self.emulator.copy(tables.astype(np.int64 if wide else np.int32))
        most = tables.shape[2]
        steps = (tables.shape[1] * most, most) if case.per_head else (most, 0)
        return Pages(pointer(memory), 0, *steps, count, case.page.bit_length() - 1, wide, case.per_head)

    def compact(self, source: Source, tables: np.ndarray, positions: np.ndarray, lengths: np.ndarray,
                cu_seqlens: np.ndarray) -> tuple[list[list[tuple[Strided, np.ndarray]]], np.ndarray]:  # fmt: skip
        case, emulator = self.case, self.emulator
        moved = [[self.placed(pool) for pool in layers] for layers in case.pools]
        buffers = emulator.structs([one for layers in moved for one, _ in layers])
        sizes = emulator.copy(np.array([layers[0].data.shape[-1] for layers in case.pools], np.int64))
        free = emulator.empty(tables.shape[0] * tables.shape[1], np.int32)
        copies = [emulator.copy(values.astype(np.int32)) for values in (positions, lengths, cu_seqlens)]
        emulator.compact(CompactParams(source, self.pages(tables, case.pools[0][0].data.shape[0]), case.to_back,
                                       positions.size, len(case.pools), pointer(buffers), pointer(sizes),
                                       *map(pointer, copies), pointer(free)))  # fmt: skip
        emulator.synchronize()
        return moved, free

    def run(self) -> None:
        case, rng = self.case, np.random.default_rng(self.seed)
        lengths = np.array([kept.size for kept in case.kept])
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.concatenate([*case.kept, np.full(int(rng.integers(0, 40)), -1)])
        moved, free = self.compact(self.source(case.lengths), case.tables, positions, lengths, cu_seqlens)
        for i, layers in enumerate(moved):
            for n, (_, got) in enumerate(layers):
                oracle.same(f"pool {i} of layer {n}", got, self.expected(case.pools[i][n].data, n))
        oracle.same("free pages", free, self.free_pages().ravel())

    def expected(self, data: np.ndarray, layer: int) -> np.ndarray:
        case, out = self.case, data.copy()
        _, batch, heads = case.shape
        for b in range(batch):
            for h in range(heads):
                kept = case.kept[(layer * batch + b) * heads + h]
                table, head = case.tables[b, h if case.per_head else 0], 0 if case.per_head else h
                to = np.arange(kept.size) + (case.lengths[b, h] - kept.size if case.to_back else 0)
                rows = data[table[kept // case.page], head, kept % case.page]
                out[table[to // case.page], head, to % case.page] = rows
        return out

    def free_pages(self) -> np.ndarray:
        case = self.case
        kept = np.array([k.size for k in case.kept]).reshape(case.shape)
        length = np.broadcast_to(case.lengths, case.shape)
        over = 0 if case.per_head else (0, 2)
        if case.to_back:
            return ((length - kept) // case.page).min(over)
        return (-(-length // case.page)).max(over) - (-(-kept // case.page)).max(over)

    def run_hostile(self) -> None:
        """Ids, positions and lengths that nobody checked: reads and writes stay inside of the pools."""
        case, rng = self.case, np.random.default_rng(self.seed)
        count = case.pools[0][0].data.shape[0]
        tables = rng.choice([-(2**31), -1, 0, 1, count - 1, count, 2**31 - 1], case.tables.shape)
        total = int(rng.integers(0, 300))
        positions = rng.integers(-4, case.tokens + 4, total)
        rows = int(np.prod(case.shape))
        cu_seqlens = np.sort(rng.integers(0, total + 1, rows + 1))
        wild = rng.choice([-(2**31), -1, 0, 3, total, 2**31 - 1], rows)
        self.compact(self.source(rng.integers(-3, case.tokens + 3, case.lengths.shape)), tables, positions, wild,
                     cu_seqlens)  # fmt: skip


def run(emulator: Emulator, seed: int, schedule: Schedule) -> None:
    case = make_case(seed)
    Run(emulator, case, schedule, seed).run()
    Run(emulator, case, schedule, seed).run_hostile()
