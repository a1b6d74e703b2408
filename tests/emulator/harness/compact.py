"""Eviction in place, in pages, in order and in any order, of positions that the harness chooses; and its oracle."""

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
class Table:
    page: int
    per_head: bool
    count: int  # pages of a pool
    ids: np.ndarray  # [batch, heads or 1, M]


@dataclass
class Case:
    shape: tuple[int, int, int]  # layers, batch, heads
    tokens: int
    to_back: bool
    any_order: bool
    lengths: np.ndarray  # [batch, heads], for all layers
    kept: list[np.ndarray]  # positions of each segment
    pools: list[list[Pool]]  # [payload][layer]
    tables: list[Table]  # of each payload
    block: int


def make_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    block = one_of(64, 64, 64, 0)
    layers, batch, heads = (int(rng.integers(1, 4)) for _ in range(3))
    tokens = one_of(1, 5, 31, 130, 400)
    if block == 0:  # blocks of production size take few and long segments
        layers, batch, heads, tokens = 1, 1, int(rng.integers(1, 3)), one_of(130, 400, 1500)
    to_back, any_order = rng.random() < 0.5, rng.random() < 0.5
    lengths = rng.integers(0, tokens + 1, (batch, heads))

    def make_table() -> Table:
        page, per_head = one_of(1, 2, 4, 16, 64), rng.random() < 0.5
        most, owners = -(-tokens // page) + one_of(0, 2), heads if per_head else 1
        used = -(-(lengths if per_head else lengths.max(1, keepdims=True)) // page)
        count = int(used.sum()) + one_of(0, 3)
        free, ids = rng.permutation(count), np.full((batch, owners, most), one_of(-1, 2**31 - 1, count))
        for b in range(batch):  # what is behind the used pages is not read
            for h in range(owners):
                mine, free = free[: used[b, h]], free[used[b, h] :]
                ids[b, h, : mine.size] = mine
        return Table(page, per_head, count, ids)

    tables, pools = [make_table()], []
    for i in range(one_of(1, 2, 2, 3)):
        if i > 0:
            tables.append(make_table() if rng.random() < 0.3 else tables[0])
        of = tables[i]
        size, rows_first = one_of(*(ALIGNED_ROW_BYTES if block == 0 else (*ROW_BYTES, 320, 1024))), rng.random() < 0.5
        gap, lead = one_of((0, 0), (16, 0), (0, 8), (1, 1), (size, 2))
        pools.append([Pool(rng.integers(1, 256, (of.count, heads // of.ids.shape[1], of.page, size), dtype=np.uint8),
                           rows_first, gap, lead) for _ in range(layers)])  # fmt: skip
    share, kept = one_of(0.1, 0.5, 0.5, 0.9, 1.0), []
    for row in range(layers * batch * heads):
        length = lengths[row // heads % batch, row % heads]
        chosen = np.flatnonzero(rng.random(length) < share * rng.random() * 2)
        if to_back:  # whole pages are dropped
            others = np.setdiff1d(np.arange(length), chosen)
            chosen = np.sort(np.concatenate([chosen, others[: (length - chosen.size) % max(x.page for x in tables)]]))
        kept.append(chosen)
    return Case((layers, batch, heads), tokens, to_back, any_order, lengths, kept, pools, tables, block)


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
        head = strides[1] if pool.data.shape[1] > 1 else 0  # pages of one head, or no other head
        return Strided(pointer(memory) + pool.lead, strides[0], head, strides[2]), view

    def pages(self, tables: list[np.ndarray]) -> tuple[list[Pages], list[np.ndarray]]:
        """Those of all payloads with these ids, and where the free pages of each table are counted."""
        case, wide, done, free = self.case, self.seed % 2 == 1, [], []
        for i, (table, ids) in enumerate(zip(case.tables, tables, strict=True)):
            memory = self.emulator.copy(ids.astype(np.int64 if wide else np.int32))
            most, counted = ids.shape[2], i == 0 or table is not case.tables[0]
            steps = (ids.shape[1] * most, most) if table.per_head else (most, 0)
            free.append(self.emulator.empty(ids.shape[0] * ids.shape[1] if counted else 0, np.int32))
            shift = table.page.bit_length() - 1
            done.append(Pages(pointer(memory), 0, *steps, table.count, shift, wide, table.per_head,
                              pointer(free[-1]) if counted else None))  # fmt: skip
        return done, free

    def compact(
        self, source: Source, tables: list[np.ndarray], positions: np.ndarray, lengths: np.ndarray,
        cu_seqlens: np.ndarray
    ) -> tuple[list[list[tuple[Strided, np.ndarray]]], list[np.ndarray], np.ndarray]:  # fmt: skip
        """Pools, free pages, and positions by the rows where they are now."""
        case, emulator = self.case, self.emulator
        moved = [[self.placed(pool) for pool in layers] for layers in case.pools]
        buffers = emulator.structs([one for layers in moved for one, _ in layers])
        sizes = emulator.copy(np.array([layers[0].data.shape[-1] for layers in case.pools], np.int64))
        pages, free = self.pages(tables)
        copies = [emulator.copy(values.astype(np.int32)) for values in (positions, lengths, cu_seqlens)]
        filled = emulator.empty(positions.size, np.int32) if case.any_order else copies[0]
        emulator.compact(CompactParams(source, pointer(emulator.structs(pages)), case.to_back, positions.size,
                                       len(case.pools), pointer(buffers), pointer(sizes), *map(pointer, copies),
                                       pointer(filled) if case.any_order else None))  # fmt: skip
        emulator.synchronize()
        return moved, free, filled

    def run(self) -> None:
        case, rng = self.case, np.random.default_rng(self.seed)
        lengths = np.array([kept.size for kept in case.kept])
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        slack = np.full(int(rng.integers(0, 40)), -1)
        ids = [table.ids for table in case.tables]
        moved, free, filled = self.compact(self.source(case.lengths), ids, np.concatenate([*case.kept, slack]), lengths,
                                           cu_seqlens)  # fmt: skip
        for i, layers in enumerate(moved):
            for n, (_, got) in enumerate(layers):
                oracle.same(f"pool {i} of layer {n}", got, self.expected(i, n))
        for table, counted in zip(case.tables, free, strict=True):
            oracle.same("free pages", counted, self.free_pages(table).ravel()[: counted.size])
        there = [self.sources(row)[0] for row in range(len(case.kept))]
        oracle.same("positions", filled, np.concatenate([*there, slack]))

    def sources(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """What a segment keeps, by the slots where it goes, and these slots."""
        case, kept = self.case, self.case.kept[row]
        _, batch, heads = case.shape
        length = case.lengths[row // heads % batch, row % heads]
        to = np.arange(kept.size) + (length - kept.size if case.to_back else 0)
        return oracle.sources(kept, to, case.any_order), to

    def expected(self, payload: int, layer: int) -> np.ndarray:
        case, table = self.case, self.case.tables[payload]
        data = case.pools[payload][layer].data
        out, (_, batch, heads) = data.copy(), case.shape
        for b in range(batch):
            for h in range(heads):
                kept, to = self.sources((layer * batch + b) * heads + h)
                ids, head = table.ids[b, h if table.per_head else 0], 0 if table.per_head else h
                rows = data[ids[kept // table.page], head, kept % table.page]
                out[ids[to // table.page], head, to % table.page] = rows
        return out

    def free_pages(self, table: Table) -> np.ndarray:
        case = self.case
        kept = np.array([k.size for k in case.kept]).reshape(case.shape)
        length = np.broadcast_to(case.lengths, case.shape)
        over = 0 if table.per_head else (0, 2)
        if case.to_back:
            return ((length - kept) // table.page).min(over)
        return (-(-length // table.page)).max(over) - (-(-kept // table.page)).max(over)

    def run_hostile(self) -> None:
        """Ids, positions and lengths that nobody checked: reads and writes stay inside of the pools."""
        case, rng = self.case, np.random.default_rng(self.seed)
        wild_ids = [rng.choice([-(2**31), -1, 0, 1, x.count - 1, x.count, 2**31 - 1], x.ids.shape) for x in case.tables]
        total = int(rng.integers(0, 300))
        positions = rng.integers(-4, case.tokens + 4, total)
        positions[rng.random(total) < 0.05] = rng.choice([-(2**31), 2**31 - 1])  # far outside of any table
        if rng.random() < 0.5:
            positions.sort()
        rows = int(np.prod(case.shape))
        cu_seqlens = np.sort(rng.integers(0, total + 1, rows + 1))
        wild = rng.choice([-(2**31), -1, 0, 3, total, 2**31 - 1], rows)
        self.compact(self.source(rng.integers(-3, case.tokens + 3, case.lengths.shape)), wild_ids, positions, wild,
                     cu_seqlens)  # fmt: skip


def run(emulator: Emulator, seed: int, schedule: Schedule) -> None:
    case = make_case(seed)
    Run(emulator, case, schedule, seed).run()
    Run(emulator, case, schedule, seed).run_hostile()
