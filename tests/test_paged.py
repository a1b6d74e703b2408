"""evict_paged_ is its reference, byte by byte of the pools, and chooses the rows that the other evictions choose."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field

import pytest
import torch
from cases import (
    DTYPES,
    SCORES,
    bits,
    check_index,
    generator,
    rows_of,
    scores_of,
    spread,
    storage_bytes,
    twins,
    unreadable,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import budgets as some_budgets
from torch import Tensor

import lkv_ext
import lkv_ext.numpy
from lkv import reference

PAGES = (1, 2, 4, 16, 64, 256)


@dataclass
class Engine:
    """Pools of pages that belong to an engine: shuffled, with pages of others between them."""

    pools: list[Tensor]
    tables: Tensor
    lengths: Tensor  # [B, H]
    page: int
    scores: Tensor
    budgets: object = 0
    options: dict = field(default_factory=dict)
    companions: list[Tensor] = field(default_factory=list)
    companion_tables: list[Tensor] = field(default_factory=list)
    readable: bool = True

    @property
    def arguments(self) -> tuple:
        return self.pools, self.scores, self.budgets, self.tables, self.lengths

    def evict(self, **changes: object) -> lkv_ext.PagedIndex:
        with contextlib.nullcontext() if self.readable else unreadable():
            return lkv_ext.evict_paged_(*self.arguments, **(self.options | self.beside | changes))

    def expected(self, pools: list[Tensor], **changes: object) -> reference.evict.Evicted:  # type: ignore[name-defined]
        """`pools`: with the companions behind them."""
        options = self.options | self.beside | changes
        pools, count = [bits(t) for t in pools], len(self.pools)
        return reference.evict_paged_(
            pools[:count], self.scores, spread(self.budgets, self.lengths.shape), self.tables, self.lengths,
            **options | dict(companions=pools[count:])
        )  # fmt: skip

    @property
    def beside(self) -> dict:
        return dict(companions=self.companions, companion_tables=self.companion_tables)

    @property
    def placed(self) -> list[tuple[Tensor, Tensor]]:
        """Every pool with its table."""
        own = zip(self.companions, self.companion_tables, strict=True)
        return [*((pool, self.tables) for pool in self.pools), *own]


def logical(pool: Tensor, tables: Tensor, tokens: int) -> Tensor:
    """A copy `[B, H, tokens, ...]` of what the tables name; anything where they name no page."""
    pages = bits(pool)[tables.long().clamp(0, pool.shape[0] - 1)]
    pages = pages if tables.dim() == 3 else pages.transpose(1, 2)
    return pages.flatten(2, 3)[:, :, :tokens].contiguous().view(pool.dtype)


def engine_of(
    shape: tuple[int, int], lengths: Tensor, page: int, *, per_head: bool, dims: list[int], how: str,
    dtype: torch.dtype = torch.bfloat16, tokens: int | None = None, wide: bool = False, seed: int = 0,
    scores: Tensor | None = None,
) -> Engine:  # fmt: skip
    """Pools in memory order `how`, and tables whose unused ends name no page."""
    batch, heads = shape
    tokens = int(lengths.max()) if tokens is None else tokens
    owners = heads if per_head else 1
    used = -(-(lengths if per_head else lengths.amax(1, keepdim=True)) // page)
    count, most = int(used.sum()) + 3, -(-tokens // page) + 1
    ids = torch.randperm(count, generator=generator(seed))
    tables = torch.full((batch, owners, most), -1 if seed % 2 else 2**31 - 1)
    for b in range(batch):
        for h in range(owners):
            mine, ids = ids.split([int(used[b, h]), len(ids) - int(used[b, h])])
            tables[b, h, : len(mine)] = mine
    tables = tables.to(torch.int64 if wide else torch.int32)
    inner = heads // owners
    if how == "packed":  # K and V beside each other
        both = rows_of([count, inner, page, sum(dims)], dtype, seed)
        pools = list(both.split(dims, -1))
    elif how == "stacked":  # an axis of K and V, rows first
        both = rows_of([count, len(dims), page, inner, max(dims)], dtype, seed)
        pools = [both[:, i, :, :, :dim].transpose(1, 2) for i, dim in enumerate(dims)]
    else:
        pools = [rows_of([count, inner, page, dim], dtype, seed + i) for i, dim in enumerate(dims)]
    if per_head:
        pools, ready = [pool[:, 0] for pool in pools], tables
    else:
        ready = tables[:, 0]
    scores = scores_of("normal", [batch, heads, tokens], seed) if scores is None else scores
    return Engine(pools, ready, lengths, page, scores)


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    page, per_head = draw(st.sampled_from(PAGES)), draw(st.booleans())
    tokens = draw(st.one_of(st.integers(0, 40), st.integers(0, 300)))
    count, seed = shape[0] * shape[1], draw(st.integers(0, 2**20))
    lengths = torch.tensor(draw(st.lists(st.integers(0, tokens), min_size=count, max_size=count))).view(shape)
    kind, dtype = draw(st.sampled_from(SCORES)), draw(st.sampled_from(DTYPES))
    scores = scores_of(kind, [*shape, tokens], seed).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    engine = engine_of(
        shape, lengths, page, per_head=per_head, dims=draw(st.lists(st.sampled_from([1, 3, 8, 24, 64]), min_size=1,
        max_size=3)), how=draw(st.sampled_from(["apart", "packed", "stacked"])), dtype=dtype, tokens=tokens,
        wide=draw(st.booleans()), seed=seed, scores=scores)  # fmt: skip
    engine.readable = draw(st.booleans())
    engine.budgets = draw(some_budgets(shape, tokens, device_only=not engine.readable))
    reach = st.one_of(st.just(0), st.integers(0, 8), st.integers(0, tokens + 5))
    engine.options = dict(sink=draw(reach), window=draw(reach), to=draw(st.sampled_from(["front", "back"])),
                          order=draw(st.sampled_from(["ascending", "any"])))  # fmt: skip
    for i in range(draw(st.integers(0, 2))):  # in pages of their own
        other = engine_of(shape, lengths, draw(st.sampled_from(PAGES)), per_head=draw(st.booleans()), dims=[3 + i],
                          how=draw(st.sampled_from(["apart", "stacked"])), dtype=draw(st.sampled_from(DTYPES)),
                          tokens=tokens, wide=draw(st.booleans()), seed=seed + 7 + i)  # fmt: skip
        engine.companions += other.pools
        engine.companion_tables.append(other.tables)
    if not engine.readable or draw(st.booleans()):
        engine.options["max_budget"] = draw(st.integers(0, tokens + 2))
    return engine


@given(engines())
def test_paged_is_the_reference(engine: Engine) -> None:
    """Every byte of the pools: what is not a kept row's place is a canary."""
    mine = engine.pools + engine.companions
    theirs = twins(mine)
    index = engine.evict()
    want = engine.expected(theirs, total=None if engine.readable else index.positions.numel())
    check_index(index, want)
    assert index.free_pages.dtype == torch.int32 and torch.equal(index.free_pages, want.free_pages)
    for free, wanted in zip(index.companion_free_pages, want.companion_free_pages, strict=True):
        assert torch.equal(free, wanted)
    for got, wanted in zip(mine, theirs, strict=True):
        assert torch.equal(storage_bytes(got), storage_bytes(wanted))


@given(engines())
def test_the_same_rows_everywhere(engine: Engine) -> None:
    """Packed, padded, in place to either end and in any order, and paged: the same rows for the same selection."""
    engine.readable = True
    tokens, to, order = engine.scores.shape[2], engine.options["to"], engine.options["order"]
    dense = [logical(pool, table, tokens) for pool, table in engine.placed]
    index = engine.evict()
    options = {name: engine.options[name] for name in ("sink", "window")} | dict(lengths=engine.lengths)
    budgets, rest = index.lengths, dict(companions=dense[1:])
    packed = lkv_ext.evict(dense[0], None, engine.scores, budgets, **options, **rest)
    padded = lkv_ext.evict(dense[0], None, engine.scores, budgets, **options, **rest, layout="padded")
    assert torch.equal(packed.cu_seqlens, index.cu_seqlens)
    ends, moved = {}, {}
    for end in itertools.product(("front", "back"), ("ascending", "any")):
        k, *companions = ends[end] = [d.clone() for d in dense]
        where = dict(companions=companions, to=end[0], order=end[1])
        moved[end] = lkv_ext.evict_(k, None, engine.scores, budgets, **options, **where)
    paged = [logical(pool, table, tokens) for pool, table in engine.placed]
    assert torch.equal(moved[to, order].positions, index.positions)
    for p, rows in enumerate((packed.k, *packed.companions)):
        for row in range(engine.lengths.numel()):
            b, h = divmod(row, engine.lengths.shape[1])
            want = bits(rows[packed.cu_seqlens[row] : packed.cu_seqlens[row + 1]])
            keep, length = len(want), int(engine.lengths[b, h])
            at = {"front": slice(0, keep), "back": slice(length - keep, length)}
            assert torch.equal(bits((padded.k, *padded.companions)[p][b, h, :keep]), want)
            for (end, how), rows_there in ends.items():
                # Sorted by where they were, rows in any order are those in ascending order.
                span = slice(*packed.cu_seqlens[row : row + 2])
                ascending, order_of = moved[end, how].positions[span].sort()
                assert torch.equal(ascending, packed.positions[span])
                assert torch.equal(bits(rows_there[p][b, h, at[end]])[order_of], want)
            assert torch.equal(bits(paged[p][b, h, at[to]]), bits(ends[to, order][p][b, h, at[to]]))


@pytest.mark.parametrize("to", ["front", "back"])
@pytest.mark.parametrize("per_head", [False, True])
def test_layers_in_one_launch(per_head: bool, to: str) -> None:
    """Other budgets and other scores in every layer; a page is free where no layer needs it."""
    lengths = torch.tensor([[40, 13], [7, 33]])
    layers = [engine_of((2, 2), lengths, 4, per_head=per_head, dims=[8, 3], how="apart", seed=2) for _ in range(3)]
    budgets = torch.tensor([[3, 20], [11, 11], [40, 1]])
    for n, layer in enumerate(layers):
        layer.scores, layer.budgets = scores_of("ties", [2, 2, 40], n), budgets[n]
        layer.pools = [rows_of(list(pool.shape), pool.dtype, 7 * n + i) for i, pool in enumerate(layer.pools)]
    alone = [twins(layer.pools) for layer in layers]
    pools = [list(kind) for kind in zip(*(layer.pools for layer in layers), strict=True)]
    scores, tables = [layer.scores for layer in layers], layers[0].tables
    index = lkv_ext.evict_paged_(pools, scores, budgets, tables, lengths, to=to, check=True)
    wants = [layer.expected(mine, to=to) for layer, mine in zip(layers, alone, strict=True)]
    assert torch.equal(index.lengths, torch.stack([want.lengths for want in wants]))
    assert torch.equal(index.positions, torch.cat([want.positions for want in wants]))
    assert all(torch.equal(bits(a), bits(b)) for x, mine in zip(layers, alone, strict=True) for a, b in
               zip(x.pools, mine, strict=True))  # fmt: skip
    free = torch.stack([want.free_pages for want in wants])
    used = -(-(lengths if per_head else lengths.amax(1)) // 4)
    assert torch.equal(index.free_pages, free.amin(0)) and bool((index.free_pages <= used).all())
    one = lkv_ext.evict_paged_([[p[0]] for p in pools], scores[0][None], budgets[:1], tables, 5, to=to)
    assert one.lengths.shape == (1, 2, 2)


def test_threads_do_not_show() -> None:
    threads, results = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for way in itertools.product(("front", "back"), ("ascending", "any")):
                lengths = torch.tensor([[5000, 4999, 777]])
                engine = engine_of((1, 3), lengths, 16, per_head=True, dims=[64, 32], how="apart")
                engine.budgets = [2500, 3, 600]
                index = engine.evict(to=way[0], order=way[1])
                first = results.setdefault(way, [index.positions, *engine.pools])
                for mine, theirs in zip([index.positions, *engine.pools], first, strict=True):
                    assert torch.equal(bits(mine), bits(theirs))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", [1, 4, 16])
def test_select_finds_what_an_eviction_to_the_back_keeps(page: int) -> None:
    """Before anything moves; scores are by token, so it needs no tables."""
    engine = engine_of((2, 2), torch.tensor([[61, 13], [40, 64]]), page, per_head=True, dims=[4], how="apart")
    engine.budgets = [[9, 2], [40, 17]]
    index = lkv_ext.select(engine.scores, engine.budgets, lengths=engine.lengths, page=page)
    numpy = lkv_ext.numpy.select(engine.scores.numpy(), engine.budgets, lengths=engine.lengths.numpy(), page=page)
    moved = engine.evict(to="back")
    assert torch.equal(index.positions, moved.positions) and torch.equal(index.lengths, moved.lengths)
    assert numpy.positions.tolist() == index.positions.tolist() and numpy.lengths.tolist() == index.lengths.tolist()
    assert not ((engine.lengths - index.lengths) % page).any()


@pytest.mark.parametrize("to", ["front", "back"])
def test_rows_in_any_order_stay_where_they_are(to: str) -> None:
    """Of five kept rows of eight, those in the first (last) five slots stay; the others fill the holes."""
    scores = torch.tensor([9.0, 0, 8, 0, 0, 7, 6, 5])[None, None]
    k = torch.arange(8)[None, None, :, None].clone()
    index = lkv_ext.evict_(k, None, scores, 5, to=to, order="any")
    want = {"front": [0, 7, 2, 6, 5], "back": [2, 0, 5, 6, 7]}[to]
    assert index.positions.tolist() == want
    assert k.flatten().tolist() == (want + [5, 6, 7] if to == "front" else [0, 1, 2, *want])


def test_bytes_kept_and_freed() -> None:
    """Two layers, heads that share pages of 4, and scales in pages of 8 of one head each."""
    pools = [[torch.rand(12, 2, 4, 6).bfloat16() for _ in range(2)] for _ in range(2)]
    scales = [torch.rand(9, 8, 1) for _ in range(2)]
    tables, own = torch.arange(12).view(2, 6), torch.arange(8).view(2, 2, 2)
    lengths, budgets = torch.tensor([16, 12]), [[9, 2], [1, 3]]
    index = lkv_ext.evict_paged_(
        pools, torch.rand(2, 2, 2, 16), budgets, tables, lengths, companions=[scales], companion_tables=[own]
    )
    assert index.free_pages.tolist() == [1, 0] and index.companion_free_pages[0].tolist() == [[0, 1], [0, 1]]
    assert index.retained_bytes.dtype == torch.int64 and index.retained_bytes.shape == ()
    assert int(index.retained_bytes) == 2 * (9 + 2 + 1 + 3) * (2 * 12 + 4)
    assert int(index.reclaimable_bytes) == 1 * 2 * 2 * 2 * 4 * 12 + 2 * 2 * 8 * 4
    again, spec = torch.utils._pytree.tree_flatten(index)
    assert int(torch.utils._pytree.tree_unflatten(again, spec).reclaimable_bytes) == int(index.reclaimable_bytes)


def test_a_companion_with_larger_pages_is_left_in_whole_pages() -> None:
    """To the back, what is dropped is a multiple of every page, so that all tables can be shifted."""
    engine = engine_of((1, 1), torch.tensor([[60]]), 4, per_head=False, dims=[4], how="apart")
    other = engine_of((1, 1), torch.tensor([[60]]), 16, per_head=True, dims=[2], how="apart")
    engine.companions, engine.companion_tables, engine.budgets = other.pools, [other.tables], 20
    index = engine.evict(to="back")
    assert index.lengths.tolist() == [[28]] and index.free_pages.tolist() == [8]
    assert index.companion_free_pages[0].tolist() == [[2]]


@pytest.mark.parametrize("lead", [0, 1])
def test_many_rows_in_any_order(lead: int) -> None:
    """Enough to be written past the cache; and beside the lines and vectors of memory, where they may not."""
    pages, page, dim, scores = 800, 64, 128, scores_of("normal", [1, 1, 800 * 64], 3)
    memory = rows_of([pages * page * dim + 32], torch.float32, 5)
    start = (-memory.data_ptr() // 4 + lead) % 16
    pool = memory[start : start + pages * page * dim].view(pages, 1, page, dim)
    tables, before = torch.randperm(pages, generator=generator(1))[None], memory.clone()
    index = lkv_ext.evict_paged_([pool], scores, 45000, tables, order="any")
    old = before[start : start + pages * page * dim].view(pool.shape)[tables[0], 0].flatten(0, 1)
    new = pool[tables[0], 0].flatten(0, 1)
    assert torch.equal(bits(new[:45000]), bits(old[index.positions.long()]))
    assert torch.equal(bits(new[45000:]), bits(old[45000:]))
    assert torch.equal(bits(memory[:start]), bits(before[:start])) and torch.equal(index.free_pages, torch.tensor([96]))


def test_flooring_keeps_the_next_best() -> None:
    """What stays because pages are whole is what has the next best scores."""
    scores = torch.arange(10.0).flip(0)[None, None]
    k = torch.arange(10)[None, None, :, None].clone()
    index = lkv_ext.evict_(k, None, scores, 3, to="back", page=4)
    assert index.lengths.tolist() == [[6]] and k.flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    index = lkv_ext.evict_(k, None, scores, 7, to="back", page=4)
    assert index.lengths.tolist() == [[10]]


def test_a_table_is_shifted_by_its_free_pages() -> None:
    """What an engine does behind an eviction to the back; then the sequence is evicted again."""
    engine = engine_of((1, 2), torch.tensor([[64, 64]]), 8, per_head=False, dims=[4], how="apart")
    dense = logical(engine.pools[0], engine.tables, 64)
    first = lkv_ext.evict_paged_(engine.pools, engine.scores, 20, engine.tables, to="back")
    assert first.free_pages.tolist() == [5] and first.lengths.tolist() == [[24, 24]]
    left = engine.tables[:, 5:]
    scores = engine.scores.flatten(0, 1).gather(1, first.positions.view(2, 24).long())[None]
    second = lkv_ext.evict_paged_(engine.pools, scores, 9, left, lengths=[24], to="back")
    assert second.free_pages.tolist() == [1] and second.lengths.tolist() == [[16, 16]]
    once = lkv_ext.evict(dense, None, engine.scores, 16)
    rows = logical(engine.pools[0], left[:, 1:], 16)
    assert torch.equal(bits(rows.flatten(0, 2)), bits(once.k))


POOL = torch.rand(8, 2, 4, 3)
BAD = {
    "twice in one table": (dict(tables=[[0, 1, 1, 3]], check=True), r"page 1 more often"),
    "an id out of the pool": (dict(tables=[[0, 1, 8, 3]], check=True), r"page ids in \[0, 8\), got 8"),
    "a negative id": (dict(tables=[[0, -1, 2, 3]], check=True), r"page ids in \[0, 8\), got -1"),
    "lengths past the table": (dict(lengths=[17]), r"lengths of at most L = 16.* got 17"),
    "scores past the table": (dict(scores=torch.rand(1, 2, 17)), r"scores of at most 16 tokens.*4 pages of 4, got 17"),
    "a table of floats": (dict(tables=torch.rand(1, 4)), r"tables of dtype int32 or int64"),
    "a table of another batch": (dict(tables=[[0, 1, 2, 3]] * 2), r"tables of shape \[B, M\] or \[B, H, M\]"),
    "a strided table": (dict(tables=torch.zeros(1, 8).int()[:, ::2]), r"tables contiguous in the last axis"),
    "no pools": (dict(pools=[]), r"at least one pool"),
    "pools of other pages": (dict(pools=[POOL, torch.rand(8, 2, 8, 3)]), r"pools\[1\] with 8 pages of 4 rows"),
    "pools of another number": (dict(pools=[POOL, torch.rand(9, 2, 4, 3)]), r"pools\[1\] with 8 pages"),
    "pools of other heads": (dict(pools=[torch.rand(8, 3, 4, 3)]), r"pools\[0\] of shape \[P, H, page, ...\]"),
    "pools of low rank": (dict(pools=[torch.rand(8, 2)]), r"pools\[0\] of shape \[P, H, page, ...\]"),
    "an odd page": (dict(pools=[torch.rand(8, 2, 6, 3)], scores=torch.rand(1, 2, 8)), r"pages of a power of two"),
    "an empty page": (dict(pools=[torch.rand(8, 2, 0, 3)]), r"pages of a power of two"),
    "a strided last axis": (dict(pools=[torch.rand(8, 2, 4, 6)[..., ::2]]), r"pools\[0\] contiguous after the token"),
    "overlapping pools": (dict(pools=[POOL, POOL[..., 1:]]), r"pools\[0\] and pools\[1\] without common memory"),
    "a pool over itself": (dict(pools=[torch.rand(1, 2, 4, 3).expand(8, 2, 4, 3)]), r"memory of its own"),
    "scores in a pool": (dict(pools=[POOL], scores=POOL.view(-1)[:32].view(1, 2, 16)), r"without common memory"),
    "companions without tables": (dict(companions=[POOL]), r"one of companion_tables for each of companions, got 0"),
    "a companion's page twice": (dict(companions=[torch.rand(8, 2, 8, 3)], companion_tables=[torch.tensor([[4, 4]])],
                                      check=True), r"companion_tables\[0\] that use every page once, got page 4"),
    "a companion's odd page": (dict(companions=[torch.rand(8, 2, 6, 3)], companion_tables=[torch.tensor([[4, 3, 2]])]),
                               r"pages of a power of two of rows, got companions\[0\] of shape"),
    "a companion's short table": (dict(companions=[torch.rand(8, 2, 8, 3)], companion_tables=[torch.tensor([[4]])]),
                                  r"at most 8 tokens, as companion_tables\[0\] have 1 pages of 8"),
    "a companion in a pool": (dict(companions=[POOL[..., 1:]], companion_tables=[torch.tensor([[0, 1, 2, 3]])]),
                              r"pools\[0\] and companions\[0\] without common memory"),
    "no order": (dict(order="descending"), r"order 'ascending' or 'any'"),
    "no end": (dict(to="middle"), r"to 'front' or 'back'"),
    "layers for one tensor of scores": (dict(pools=[[torch.rand(8, 2, 4, 3)]]), r"pools"),
    "scores of layers for pools of one": (dict(scores=torch.rand(2, 1, 2, 16)), r"one pool per layer"),
    "a pool that requires a gradient": (dict(pools=[torch.rand(8, 2, 4, 3, requires_grad=True)]), r"no derivative"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case: str) -> None:
    changes, message = BAD[case]
    given = dict(pools=[POOL], scores=torch.rand(1, 2, 16), budgets=3, tables=[[0, 1, 2, 3]]) | changes
    if isinstance(given["tables"], list):
        given["tables"] = torch.tensor(given["tables"], dtype=torch.int32)
    tensors = [t for t in given["pools"] if isinstance(t, Tensor)]
    before = [t.detach().clone() for t in tensors]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        lkv_ext.evict_paged_(**given)
    assert str(error.value).startswith("lkv_ext.evict_paged_: ")
    assert all(torch.equal(t.detach(), old) for t, old in zip(tensors, before, strict=True))


WILD = [[0, -1, 2, 3], [8, 0, 1, 2], [2**31 - 1] * 4, [-(2**31), 1, 8, 9], [1, 1, 1, 1], [7, 6, 6, 0]]


@pytest.mark.parametrize("to", ["front", "back"])
@pytest.mark.parametrize("ids", WILD)
def test_wild_tables_stay_inside_of_the_pool(ids: list[int], to: str) -> None:
    """Without a check: canaries around a pool that is a part of its memory, and other pages untouched."""
    memory = torch.rand(12, 2, 4, 3)
    before = memory.clone()
    lkv_ext.evict_paged_([memory[2:10]], torch.rand(1, 2, 16), 5, torch.tensor([ids]), to=to)
    others = [p for p in range(12) if p - 2 not in ids or p not in range(2, 10)]
    assert torch.equal(memory[others], before[others])
    assert torch.isin(memory[2:10], before[2:10]).all()  # and nothing of the others came in


def test_autograd_knows_that_pools_are_written() -> None:
    pool = torch.rand(8, 2, 4, 3)
    before = pool._version
    lkv_ext.evict_paged_([pool], torch.rand(1, 2, 16), 5, torch.tensor([[0, 1, 2, 3]]))
    assert pool._version > before


def test_no_rows_and_no_heads() -> None:
    for batch, heads, tokens in ((0, 2, 16), (1, 0, 16), (1, 2, 0)):
        for to in ("front", "back"):
            for tables in (torch.zeros(batch, 4).int(), torch.zeros(batch, heads, 4).int()):
                pool = torch.rand(8, 4, 3) if tables.dim() == 3 else torch.rand(8, heads, 4, 3)
                budgets: object = torch.zeros(batch, heads).int()
                index = lkv_ext.evict_paged_([pool], torch.rand(batch, heads, tokens), budgets, tables, to=to)
                assert index.positions.numel() == 0 and index.free_pages.shape == tables.shape[:-1]
                assert not index.free_pages.any() or tokens > 0


def test_strides_past_two_gigabytes() -> None:
    """Pages that lie more than 2**31 bytes apart, in memory of which few pages are looked at."""
    from test_layouts import untouched

    step = 2**30 + 64
    pool = untouched(3 * step).view(torch.int8).as_strided([3, 1, 8, 4], [step, 32, 4, 1])
    pool[:, 0, :, 0] = torch.arange(24, dtype=torch.int8).view(3, 8)
    scores = torch.rand(1, 1, 20)
    index = lkv_ext.evict_paged_([pool], scores, 11, torch.tensor([[2, 0, 1]]), to="back")
    assert index.free_pages.tolist() == [1] and index.lengths.tolist() == [[12]]
    order = torch.cat([pool[p, 0, :, 0] for p in (2, 0, 1)])
    tokens = torch.cat([torch.arange(8) + 8 * p for p in (2, 0, 1)])
    assert order[8:20].tolist() == tokens[index.positions.long()].tolist()
