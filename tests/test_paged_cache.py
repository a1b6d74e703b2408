"""RaggedCache.paged: requests share a pool of pages. Rows and attention are those of a dense cache with a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attend import queries, sinks_of
from test_attend_backends import BF16, installed  # noqa: F401  # a fixture
from torch import Tensor

import lkv_ext
from lkv_ext import layout

HEADS, DIM, DIM_V = 2, 8, 4


class Dense:
    """All tokens of a request, and which of them each head has kept."""

    def __init__(self) -> None:
        self.k, self.v = torch.zeros(1, HEADS, 0, DIM), torch.zeros(1, HEADS, 0, DIM_V)
        self.kept: list[list[int]] = [[] for _ in range(HEADS)]

    def append(self, k: Tensor, v: Tensor) -> None:
        seen = self.k.shape[2]
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        for kept in self.kept:
            kept += range(seen, seen + k.shape[2])

    def evict(self, scores: Tensor, budgets: list[int], sink: int, window: int) -> None:
        for head, (kept, budget) in enumerate(zip(self.kept, budgets, strict=True)):
            keep = min(max(budget, 0), len(kept))
            first = min(sink, keep)
            last = len(kept) - min(window, keep - first)
            best = sorted(range(first, last), key=lambda i: (-float(scores[0, head, i]), i))
            stay = {*range(first), *best[: keep - first - (len(kept) - last)], *range(last, len(kept))}
            self.kept[head] = [token for i, token in enumerate(kept) if i in stay]

    def attend(self, q: Tensor, causal: bool) -> Tensor:
        """Every query head over all tokens, those masked that its KV head has not kept."""
        n, seen, group = q.shape[2], self.k.shape[2], q.shape[1] // HEADS
        out = torch.zeros(1, q.shape[1], n, DIM_V)
        for head in range(q.shape[1]):
            kept = self.kept[head // group]
            for i in range(n):
                shown = torch.zeros(seen, dtype=torch.bool)
                shown[kept[: len(kept) - (n - 1 - i if causal else 0)]] = True
                if shown.any():
                    logits = self.k[0, head // group] @ q[0, head, i] * DIM**-0.5
                    out[0, head, i] = logits.masked_fill(~shown, -torch.inf).softmax(0) @ self.v[0, head // group]
        return out


def pool_of(pages: int, page: int) -> list[Tensor]:
    """K, V and a companion, with canaries where no request has written."""
    return [
        torch.full((pages, page, DIM), 777.0),
        torch.full((pages, page, DIM_V), 777.0),
        torch.full((pages, page), -7, dtype=torch.int32),
    ]


def check(caches: list[lkv_ext.PagedCache], models: list[Dense], allocator: lkv_ext.PageAllocator) -> None:
    """No page is lost, none used twice; every row lies where the tables say, with the rows of all pools."""
    held = [page for cache in caches for pages in cache._pages for page in pages]
    assert len(held) == len(set(held)) == allocator.pages - allocator.free
    assert sorted([*held, *allocator._free]) == list(range(allocator.pages))
    for cache, model in zip(caches, models, strict=True):
        counts = [len(kept) for kept in model.kept]
        assert cache.lengths.flatten().tolist() == cache._counts == counts
        assert cache.pages == sum(-(-count // cache.align) for count in counts)
        assert cache.max_length == max(counts) and cache.seen == model.k.shape[2]
        for head, kept in enumerate(model.kept):
            pages = cache.tables[0, head, : len(cache._pages[head])].tolist()
            assert pages == cache._pages[head]
            for pool, truth in ((cache.k, model.k), (cache.v, model.v)):
                assert torch.equal(pool[pages].flatten(0, 1)[: len(kept)], truth[0, head, kept])
            assert cache.companions[0][pages].flatten(0, 1)[: len(kept)].tolist() == kept


STEPS = st.tuples(
    st.integers(0, 2),  # request
    st.sampled_from(["append", "append", "append", "evict", "free"]),
    st.integers(0, 9),  # tokens, or rows that head 0 keeps
    st.integers(0, 12),  # rows that head 1 keeps
    st.integers(0, 3),  # sink and window
)


@given(st.lists(STEPS, max_size=12), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**31))
def test_requests_share_a_pool(steps, page, seed):
    """Whatever requests do; an exhausted pool changes nothing, and at the end all pages are free again."""
    g = torch.Generator().manual_seed(seed)
    pages = 40 // page
    pools, allocator = pool_of(pages, page), lkv_ext.PageAllocator(pages)
    caches = [lkv_ext.RaggedCache.paged(pools, allocator, heads=HEADS) for _ in range(3)]
    models = [Dense() for _ in caches]
    for request, step, rows, more, ends in steps:
        cache, model = caches[request], models[request]
        if step == "append":
            k, v = torch.randn(1, HEADS, rows, DIM, generator=g), torch.randn(1, HEADS, rows, DIM_V, generator=g)
            places = torch.arange(cache.seen, cache.seen + rows, dtype=torch.int32).expand(1, HEADS, rows)
            needed = sum(-(-(count + rows) // page) for count in cache._counts) - cache.pages
            if needed > allocator.free:
                before = [pool.clone() for pool in pools]
                with pytest.raises(MemoryError, match=f"PageAllocator: expected {needed} free pages of {pages}, got"):
                    cache.append(k, v, [places])
                assert all(map(torch.equal, pools, before))
            else:
                cache.append(k, v, [places])
                model.append(k, v)
        elif step == "evict":
            scores = torch.rand(1, HEADS, cache.max_length + ends, generator=g).round(decimals=1)  # ties, too
            cache.evict(scores, [rows, more], sink=ends, window=ends)
            model.evict(scores, [rows, more], ends, ends)
        else:
            cache.free()
            models[request] = Dense()
        check(caches, models, allocator)
        n = min(2, cache.seen)
        q = torch.randn(1, 2 * HEADS, max(n, 1), DIM, generator=g)
        for causal in (False, True):
            torch.testing.assert_close(cache.attend(q, causal=causal), models[request].attend(q, causal))
    for cache in caches:
        cache.free()
    assert allocator.free == pages and sorted(allocator.take(pages)) == list(range(pages))


def filled(page: int = 4, batch: int = 2, dtype: torch.dtype = torch.float32, dim: int = 16) -> tuple:
    """A paged cache, and a `RaggedCache` of the same rows."""
    g = torch.Generator().manual_seed(page)
    pages = 6 * (2 + 300 // page)
    allocator = lkv_ext.PageAllocator(pages)
    allocator.take(1)  # so that ids are not those of an empty pool
    pools = [torch.randn(pages, page, dim, generator=g).to(dtype) for _ in range(2)]
    paged = lkv_ext.RaggedCache.paged(pools, allocator, heads=3, batch=batch)
    whole = lkv_ext.RaggedCache.empty(batch, 3, dim, dtype=dtype)
    for n in (1, 40, 3):
        k, v = (torch.randn(batch, 3, n, dim, generator=g).to(dtype) for _ in range(2))
        paged.append(k, v)
        whole.append(k, v)
        scores = torch.rand(batch, 3, paged.max_length, generator=g)
        budgets = torch.randint(0, 44, (batch, 3), generator=g)
        paged.evict(scores, budgets)
        whole.evict(whole.packed(scores), budgets)
    return paged, whole


def test_attention_has_the_options_of_other_caches():
    paged, whole = filled()
    assert len(set(paged.lengths.flatten().tolist())) > 3
    q = queries(2, 6, 3, 16, torch.float32)
    for options in (dict(), dict(causal=False), dict(scale=0.3, softcap=2.0), dict(sinks=sinks_of(6))):
        torch.testing.assert_close(paged.attend(q, **options), lkv_ext.attend(q, whole, **options), rtol=0, atol=0)
        torch.testing.assert_close(lkv_ext.attend(q, paged, **options), lkv_ext.attend(q, whole, **options))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("backend, page, dim", [("flash_attn_2", 256, 16), ("flashinfer", 16, 64)])
def test_other_libraries_read_the_pages_of_the_pool(installed, backend, page, dim, n):  # noqa: F811
    installed(backend)
    paged, whole = filled(page, dtype=BF16, dim=dim)
    q = queries(2, 6, n, dim, BF16)
    for options in (dict(), dict(causal=False, softcap=2.0)):
        got = paged.attend(q, backend=backend, **options)
        torch.testing.assert_close(got, lkv_ext.attend(q, whole, **options), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["flash_attn", "torch"])
def test_libraries_that_read_no_pages_are_refused(installed, backend):  # noqa: F811
    installed(backend)
    paged, _ = filled(256, dtype=BF16)
    with pytest.raises(ValueError, match=f"expected rows that are not in pages for backend '{backend}'"):
        paged.attend(queries(2, 6, 1, 16, BF16), backend=backend)


def test_a_pool_whose_pages_hold_all_heads():
    """The pool of an engine, K beside V, as pages of one head by view: what is written lies in the engine's memory."""
    pool = torch.zeros(8, HEADS, 4, 2 * DIM)  # [P, H, page, 2 * D]
    (k, v), _ = layout.heads_as_sequences(layout.vllm(pool, "packed"), torch.zeros(1, 1, dtype=torch.int32))
    allocator = lkv_ext.PageAllocator(8 * HEADS)
    cache = lkv_ext.RaggedCache.paged([k, v], allocator, heads=HEADS)
    rows = torch.randn(2, 1, HEADS, 6, DIM)
    cache.append(*rows)
    page = int(cache.tables[0, 1, 1])  # the second page of head 1
    assert torch.equal(pool[page // HEADS, page % HEADS, :2], rows[:, 0, 1, 4:].transpose(0, 1).flatten(1))
    q = torch.randn(1, HEADS, 1, DIM)
    torch.testing.assert_close(
        cache.attend(q), torch.nn.functional.scaled_dot_product_attention(q, *rows), rtol=1e-5, atol=1e-5
    )


def test_tables_grow_to_twice_their_width():
    """So that a cache that grows page by page copies its tables seldom."""
    pools, allocator = pool_of(2 * 64, 1), lkv_ext.PageAllocator(2 * 64)
    cache = lkv_ext.RaggedCache.paged(pools[:2], allocator, heads=HEADS)
    widths = set()
    for _ in range(64):
        cache.append(torch.zeros(1, HEADS, 1, DIM), torch.zeros(1, HEADS, 1, DIM_V))
        widths.add(cache.tables.shape[2])
    assert widths == {1, 2, 4, 8, 16, 32, 64}


def test_the_allocator_refuses_pages_that_are_not_taken():
    allocator = lkv_ext.PageAllocator(4)
    assert allocator.take(3) == [0, 1, 2] and allocator.free == 1
    for wrong in ([3], [4], [-1], [0, 0], [1, 3]):
        with pytest.raises(ValueError, match="expected pages that were taken, each once, got page"):
            allocator.give(wrong)
        assert allocator.free == 1
    with pytest.raises(MemoryError, match="expected 2 free pages of 4, got 1"):
        allocator.take(2)
    allocator.give([1, 0])
    with pytest.raises(ValueError, match="expected pages that were taken, each once, got page 1"):
        allocator.give([1])
    assert allocator.take(3) == [1, 0, 3] and allocator.free == 0
    with pytest.raises((ValueError, TypeError), match="PageAllocator: expected pages"):
        lkv_ext.PageAllocator(-1)


class Wrong(lkv_ext.PageAllocator):
    def take(self, count: int) -> list[int]:
        return [page + self.pages - 1 for page in super().take(count)]

    def give(self, pages: list[int]) -> None:
        super().give([page - self.pages + 1 for page in pages])


def test_an_engine_whose_pages_are_not_in_the_pool():
    allocator = Wrong(8)
    cache = lkv_ext.RaggedCache.paged(pool_of(8, 4)[:2], allocator, heads=HEADS)
    rows = torch.zeros(1, HEADS, 5, DIM), torch.zeros(1, HEADS, 5, DIM_V)
    with pytest.raises(ValueError, match=r"PagedCache.append: expected 4 pages in \[0, 8\) from the allocator"):
        cache.append(*rows)
    assert allocator.free == 8 and cache.pages == cache.seen == 0


@pytest.mark.parametrize(
    ("pools", "named"),
    [
        ([torch.zeros(4, 4, 8)], "pools of K and V, got 1"),
        ([torch.zeros(4, 4, 8), torch.zeros(4, 4)], r"pools\[1\] of shape \[P, page, D\]"),
        ([torch.zeros(4, 3, 8), torch.zeros(4, 3, 8)], "pages of a power of two"),
        ([torch.zeros(4, 4, 8), torch.zeros(5, 4, 8)], r"pools\[1\] with pages"),
        ([torch.zeros(4, 4, 8), torch.zeros(4, 4, 8), torch.zeros(4, 2)], r"pools\[2\] with pages"),
        ([torch.zeros(4, 4, 8), None], r"pools\[1\] of shape"),
        ([torch.zeros(4, 4, 8, requires_grad=True), torch.zeros(4, 4, 8)], r"pools\[0\] that can be written to"),
    ],
    ids=["one", "rank", "page", "pages", "companion", "none", "gradient"],
)
def test_pools_that_do_not_fit(pools, named):
    with pytest.raises(ValueError, match=f"lkv_ext.RaggedCache.paged: expected {named}"):
        lkv_ext.RaggedCache.paged(pools, lkv_ext.PageAllocator(4), heads=2)


def test_arguments_that_do_not_fit():
    pools, allocator = pool_of(16, 4)[:2], lkv_ext.PageAllocator(16)
    with pytest.raises(TypeError, match="expected an allocator with take and give, got 16"):
        lkv_ext.RaggedCache.paged(pools, 16, heads=HEADS)
    cache = lkv_ext.RaggedCache.paged(pools, allocator, heads=HEADS)
    k, v = torch.zeros(1, HEADS, 5, DIM), torch.zeros(1, HEADS, 5, DIM_V)
    wrong = [
        ((k, v[:, :, :4]), ValueError, "expected v of shape"),
        ((k[:, :1], v[:, :1]), ValueError, "expected k of shape"),
        ((k.half(), v), TypeError, "expected k of dtype torch.float32"),
        ((k, v, [k]), ValueError, "expected 0 companions"),
    ]
    for arguments, kind, named in wrong:
        with pytest.raises(kind, match=f"lkv_ext.PagedCache.append: {named}"):
            cache.append(*arguments)
    assert allocator.free == 16
    cache.append(k, v)
    before = cache.k.clone()
    for scores, budgets in (
        (torch.zeros(1, HEADS, 4), 2),
        (torch.zeros(2, HEADS, 5), 2),
        (torch.zeros(1, HEADS, 5), 1.5),
    ):
        with pytest.raises((ValueError, TypeError), match="lkv_ext.PagedCache.evict: expected"):
            cache.evict(scores, budgets)
    assert torch.equal(cache.k, before) and cache.pages == 4 and cache._counts == [5, 5]
    assert "pages=4 of 4 rows" in repr(cache)


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (0, 0)])
def test_no_sequence_and_no_head(batch: int, heads: int) -> None:
    """Every step does nothing."""
    allocator = lkv_ext.PageAllocator(4)
    pools = [torch.zeros(4, 2, DIM), torch.zeros(4, 2, DIM)]
    cache = lkv_ext.RaggedCache.paged(pools, allocator, heads=heads, batch=batch)
    new = torch.zeros(batch, heads, 3, DIM)
    cache.append(new, new)
    cache.evict(torch.zeros(batch, heads, 3 if batch * heads else 0), 1)
    assert cache.attend(torch.zeros(batch, heads, 1, DIM)).shape == (batch, heads, 1, DIM)
    assert cache.packed().k.shape == (0, DIM) and allocator.free == 4
