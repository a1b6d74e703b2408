"""attend through the tables of a pool on the CPU: the sums of rows in spans, bit for bit, and no read outside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from cases import generator
from hypothesis import given
from hypothesis import strategies as st
from test_attend import SHAPES, TOLERANCE, queries, ragged, sinks_of
from test_isa import run
from torch import Tensor

import lkv_ext
from lkv_ext._torch.library import ops

MOST = 2**31 - 1
WRONG = (-(2**31), -1, MOST)


@dataclass
class Pool:
    """What `attend` reads of a `PagedCache`, made of packed rows."""

    k: Tensor
    v: Tensor
    tables: Tensor
    lengths: Tensor
    max_length: int
    kv: lkv_ext.RaggedKV

    def packed(self) -> lkv_ext.RaggedKV:
        return self.kv


def pool_of(kv: lkv_ext.RaggedKV, page: int, *, order: str = "shuffled", gap: int = 0, wide: bool = False) -> Pool:
    """NaN where no row lies, and ids of no page behind those in use. `order`: of the pages, where runs are of three;
    `gap`: numbers between the rows of a page; from 2 on there is a row between pages, too."""
    g, lengths = generator(page + gap), kv.lengths.flatten().tolist()
    used = [-(-n // page) for n in lengths]
    count = sum(used) + 2
    free = torch.arange(count)
    if order == "shuffled":
        free = torch.randperm(count, generator=g)
    elif order == "runs":
        free = torch.cat([free.split(3)[i] for i in torch.randperm(len(free.split(3)), generator=g)])
    size = page + (gap > 1)
    pools = [torch.full((count, size, t.shape[1] + gap), torch.nan, dtype=t.dtype) for t in (kv.k, kv.v)]
    pools = [p[:, :page, : t.shape[1]] for p, t in zip(pools, (kv.k, kv.v), strict=True)]
    tables = torch.empty(len(lengths), max(used) + 1, dtype=torch.int64 if wide else torch.int32)
    tables[:] = torch.tensor(WRONG)[torch.randint(3, tables.shape, generator=g)]
    for row, (pages, length) in enumerate(zip(used, lengths, strict=True)):
        mine, free = free[:pages], free[pages:]
        tables[row, :pages] = mine
        places, begin = torch.arange(length), int(kv.cu_seqlens[row])
        for pool, rows in zip(pools, (kv.k, kv.v), strict=True):
            pool[mine[places // page], places % page] = rows[begin : begin + length]
    shape = kv.lengths.shape
    return Pool(*pools, tables.view(*shape, -1), kv.lengths, kv.max_length, kv)


ORDERS = ("shuffled", "one after the other", "runs")


@pytest.mark.parametrize("page", [1, 16, 64, 256, 2048])
def test_rows_in_pages_are_read_like_rows_in_spans(device: str, page: int) -> None:
    """Every shape, with more rows than one piece of work has; rows with gaps between them, ids of both widths."""
    for i, (batch, heads, group, n, dim, dim_v, longest) in enumerate(SHAPES):
        dtype, order = list(TOLERANCE)[i % 3], ORDERS[(i + page) % 3]
        kv, q = ragged(batch, heads, dim, dim_v, longest, dtype), queries(batch, heads * group, n, dim, dtype)
        pool = pool_of(kv, page, order=order, gap=i % 4, wide=i % 3 == 0)
        moved = {x: getattr(pool, x).to(device) for x in ("k", "v", "tables", "lengths")}
        spans = {x: getattr(kv, x).to(device) for x in ("k", "v", "cu_seqlens", "lengths")}
        there = replace(pool, **moved, kv=replace(kv, **spans))
        sinks = sinks_of(heads * group)
        for options in (dict(), dict(causal=False, scale=0.3), dict(softcap=2.0, sinks=sinks)):
            given = options | ({"sinks": sinks.to(device)} if "sinks" in options else {})
            got = lkv_ext.attend(q.to(device), there, backend="lkv", **given)
            assert torch.equal(got, lkv_ext.attend(q.to(device), there.kv, backend="lkv", **given))


@given(
    st.tuples(*(st.integers(1, 3),) * 3, st.sampled_from([1, 2, 5, 66])),
    st.sampled_from([1, 7, 64, 100, 700]),
    st.sampled_from([1, 2, 8, 32, 64, 512]),
    st.sampled_from(ORDERS),
    st.tuples(*(st.sampled_from(list(TOLERANCE)),) * 3),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_shape(sizes, longest, page, order, types, causal, gap):
    batch, heads, group, n = sizes
    kv = ragged(batch, heads, 20, 24, longest, torch.float32)
    kv, q = replace(kv, k=kv.k.to(types[1]), v=kv.v.to(types[2])), queries(batch, heads * group, n, 20, types[0])
    pool = pool_of(kv, page, order=order, gap=gap, wide=causal)
    assert torch.equal(lkv_ext.attend(q, pool, causal), lkv_ext.attend(q, kv, causal))


ON_ISA = """
import sys
import torch
import lkv_ext
from test_attend import SHAPES, queries, ragged
from test_attend_paged import pool_of

assert lkv_ext.build_info()["cpu_isa"] == sys.argv[1]
for batch, heads, group, n, dim, dim_v, longest in SHAPES[1:5]:
    kv = ragged(batch, heads, dim, dim_v, longest, torch.bfloat16)
    q = queries(batch, heads * group, n, dim, torch.bfloat16)
    for page in (8, 64):
        assert torch.equal(lkv_ext.attend(q, pool_of(kv, page, order="runs")), lkv_ext.attend(q, kv))
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_instruction_sets(isa: str) -> None:
    result = run(isa, ON_ISA, isa)
    if f"LKV_CPU_ISA={isa} is not available here" in result.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert result.returncode == 0, result.stderr


def test_result_does_not_depend_on_threads() -> None:
    kv, q = ragged(1, 3, 64, 64, 9000, torch.float32), queries(1, 6, 3, 64, torch.float32)
    pool, threads, results = pool_of(kv, 16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(lkv_ext.attend(q, pool))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, lkv_ext.attend(q, kv)) for one in results)


@pytest.mark.parametrize("most", [0, 7, 40, 1000, 2**31, 2**63 - 1])
@pytest.mark.parametrize("page", [1, 8, 64])
def test_lengths_are_cut(page: int, most: int) -> None:
    """At the pages of the table, at max_length and at zero."""
    kv, q = ragged(1, 3, 8, 8, 40, torch.float32), torch.ones(1, 3, 1, 8)
    pool = pool_of(kv, page)
    pool.k.nan_to_num_(nan=0.5)
    pool.v.nan_to_num_(nan=0.5)
    reach = pool.tables.shape[2] * page
    given = replace(pool, lengths=torch.tensor([[1000, -5, MOST]], dtype=torch.int32), max_length=most)
    right = torch.tensor([[min(1000, most, reach), 0, min(most, reach)]], dtype=torch.int32)
    want = lkv_ext.attend(q, replace(pool, lengths=right, max_length=min(most, reach)))
    got = lkv_ext.attend(q, given)
    assert torch.equal(got, want) and not got[0, 1].any() and got.isfinite().all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("page", [2, 16, 64])
def test_wrong_ids_read_nothing_outside(page: int, wide: bool) -> None:
    """The nearest page of the pool is read in their place; around it lies NaN, and behind it nothing."""
    kv, q = ragged(1, 2, 8, 8, 200, torch.float32), torch.ones(1, 4, 3, 8)
    pool = pool_of(kv, page, wide=wide)
    count = len(pool.k)
    for name in ("k", "v"):
        memory = torch.full((2 * count, page, 8), torch.nan)
        rows = memory[count:] if name == "k" else memory[:count]
        rows.copy_(getattr(pool, name).nan_to_num(nan=0.25))
        setattr(pool, name, rows)
    g, ids = generator(page), torch.tensor([*WRONG, count, count - 1, 0, *((2**62, -(2**63)) if wide else ())])
    for _ in range(5):
        wrong = ids[torch.randint(len(ids), pool.tables.shape, generator=g)].to(pool.tables.dtype)
        got = lkv_ext.attend(q, replace(pool, tables=wrong))
        assert torch.equal(got, lkv_ext.attend(q, replace(pool, tables=wrong.clamp(0, count - 1))))
        assert got.isfinite().all()


def test_empty() -> None:
    lengths, tables = torch.full((1, 2), 3, dtype=torch.int32), torch.zeros(1, 2, 2, dtype=torch.int32)
    q, zeros = torch.ones(1, 4, 3, 8), torch.zeros(1, 4, 3, 8)
    none, one = torch.empty(0, 4, 8), torch.ones(1, 4, 8)
    options = (3, True, 0.5)
    assert torch.equal(ops.attend_paged(q, none, none, tables, lengths, *options).transpose(1, 2), zeros)
    assert torch.equal(ops.attend_paged(q, one, one, tables[..., :0], lengths, *options).transpose(1, 2), zeros)
    assert torch.equal(ops.attend_paged(q, one, one, tables, lengths * 0, *options).transpose(1, 2), zeros)
    for batch, heads, n in ((0, 2, 1), (1, 0, 1), (1, 2, 0)):
        shape = torch.zeros(batch, heads, dtype=torch.int32)
        out = ops.attend_paged(torch.zeros(batch, heads, n, 8), one, one, shape[..., None], shape, *options)
        assert out.shape == (batch, n, heads, 8)


def test_pages_of_expanded_pools_and_tables() -> None:
    """One page for all: zero strides, of which the sizes are as large as torch allows."""
    row = torch.randn(1, 1, 8, generator=generator(1))
    lengths, tables = torch.full((1, 2), 5, dtype=torch.int32), torch.zeros(1, 1, 4, dtype=torch.int32).expand(1, 2, 4)
    q = torch.ones(1, 2, 1, 8)
    for pages, page in ((3, 2), (2**20, 2**10), (1, 2**59)):
        pool = row.expand(pages, page, 8)
        got = ops.attend_paged(q, pool, pool, tables, lengths, 5, True, 0.5)
        torch.testing.assert_close(got, row.expand(1, 1, 2, 8))
        assert torch.equal(ops.attend_paged(q, pool, pool, tables, lengths, 2**63 - 1, True, 0.5), got)


def cache_of(page: int = 16) -> lkv_ext.PagedCache:
    g, allocator = generator(page), lkv_ext.PageAllocator(64)
    cache = lkv_ext.RaggedCache.paged([torch.zeros(64, page, 16) for _ in range(2)], allocator, heads=2)
    cache.append(*torch.randn(2, 1, 2, 90, 16, generator=g))
    cache.evict(torch.rand(1, 2, 90, generator=g), [40, 7])
    return cache


def test_nothing_is_copied_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, of a cache over a pool: the kernel reads the pages."""
    cache, q = cache_of(), queries(1, 4, 2, 16, torch.float32)
    want = lkv_ext.attend(q, cache.packed())
    monkeypatch.delattr(lkv_ext.PagedCache, "packed")
    assert torch.equal(cache.attend(q), want)


def test_compiled_and_mapped() -> None:
    cache, q = cache_of(), queries(1, 4, 2, 16, torch.float32)
    want = cache.attend(q)
    fast = torch.compile(lambda q: lkv_ext.attend(q, cache), fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(q), want)
    both = torch.vmap(lambda q: lkv_ext.attend(q, cache))(torch.stack([q, -q]))
    assert torch.equal(both[0], want) and torch.equal(both[1], cache.attend(-q))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cache.attend(q).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="require no gradient"):
        cache.attend(q.clone().requires_grad_())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tables=torch.zeros(2, 3, dtype=torch.int32)), r"tables of shape \[B, H, M\], got \[2, 3\]"),
        (dict(tables=torch.zeros(1, 3, 3, dtype=torch.int32)), r"tables of shape .* with \[B, H\] = \[1, 2\]"),
        (dict(tables=torch.zeros(1, 2, 3)), "tables of dtype int32 or int64, got float32"),
        (dict(tables=torch.zeros(1, 2, 3, dtype=torch.int32, device="meta")), "tables on cpu, got meta"),
        (dict(k=torch.zeros(64, 16, 12)), "q with rows of D = 12 as in k"),
        (dict(v=torch.zeros(64, 8, 16)), r"v of shape \[P, page, Dv\] with \[P, page\] = \[64, 16\] as in k"),
        (dict(v=torch.zeros(63, 16, 16)), r"v of shape \[P, page, Dv\] with \[P, page\] = \[64, 16\] as in k"),
        (dict(v=torch.zeros(64, 16)), r"v of shape \[P, page, D\], got \[64, 16\]"),
        (dict(v=torch.zeros(64, 16, 16, dtype=torch.float64)), "v of dtype float32, float16 or bfloat16, got float64"),
        (dict(k=torch.zeros(64, 16, 32)[..., ::2]), "k contiguous after the token axis"),
        (dict(k=torch.zeros(64, 12, 16), v=torch.zeros(64, 12, 16)), "pages of a power of two of rows, got k"),
        (dict(lengths=torch.zeros(1, 2, dtype=torch.int64)), "lengths of dtype int32"),
    ],
)
def test_errors(changes: dict[str, Tensor], message: str) -> None:
    cache = cache_of()
    for name, value in changes.items():
        setattr(cache, name, value)
    with pytest.raises((ValueError, TypeError), match=f"^lkv_ext.attend: expected {message}"):
        cache.attend(torch.zeros(1, 4, 1, 16))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_op_is_for_the_cpu() -> None:
    cache = cache_of()
    there = [x.cuda() for x in (torch.zeros(1, 4, 1, 16), cache.k, cache.v, cache.tables, cache.lengths)]
    with pytest.raises(RuntimeError, match="^ValueError: expected q on cpu, as only the kernels of the CPU read pages"):
        ops.attend_paged(*there, 40, True, 0.5)
