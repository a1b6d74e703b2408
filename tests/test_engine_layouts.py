"""lkv_ext.layout: views of engines' pools, each by an eviction in the view, seen in the engine's own memory."""

from __future__ import annotations

import pytest
import torch
from cases import rows_of
from torch import Tensor

import lkv_ext
from lkv_ext import layout

P, H, N, D, L = 6, 3, 4, 5, 2  # pages, heads, rows of a page, numbers of a row, layers
TABLES = torch.tensor([[4, 0, 3], [1, 5, -1]])
LENGTHS = torch.tensor([[12, 9, 10], [8, 3, 7]])
SIZES = dict(P=P, S=2, H=H, N=N, C=D, L=L)


def place_of(axes: str, **at: int) -> tuple[int, ...]:
    return tuple(at[axis] for axis in axes if axis in at)


def cache_of(axes: str) -> Tensor:
    """Random rows; K and V beside each other where they are no axis."""
    sizes = SIZES | ({} if "S" in axes else dict(C=2 * D))
    return rows_of([sizes[axis] for axis in axes], torch.int16, 3)


def row(cache: Tensor, axes: str, kind: int, page: int, head: int, slot: int, layer: int = 0) -> Tensor:
    """A row of K (0) or V (1), by the axes as they lie in memory: no view of ours has a part in it."""
    moved = cache[place_of(axes, P=page, S=kind, H=head, N=slot, L=layer)]
    return moved if "S" in axes else moved[kind * D : (kind + 1) * D]


def check_round_trip(cache: Tensor, axes: str, pools: list, to: str) -> None:
    """Evicts through `pools`, and compares with rows moved one by one in a copy of the engine's memory."""
    layers = L if "L" in axes else 1
    want = cache.clone()
    scores = torch.rand(layers, 2, H, 12, generator=torch.Generator().manual_seed(1))
    ranking = scores if "L" in axes else scores[0]
    index = lkv_ext.evict_paged_(pools, ranking, 5, TABLES, LENGTHS, to=to, check=True)
    before, offsets = want.clone(), index.cu_seqlens.tolist()
    for segment in range(layers * 2 * H):
        n, b, h = segment // (2 * H), segment // H % 2, segment % H
        positions = index.positions[offsets[segment] : offsets[segment + 1]].tolist()
        first = 0 if to == "front" else int(LENGTHS[b, h]) - len(positions)
        for i, position in enumerate(positions):
            for kind in (0, 1):
                source = row(before, axes, kind, int(TABLES[b, position // N]), h, position % N, n)
                slot = first + i
                row(want, axes, kind, int(TABLES[b, slot // N]), h, slot % N, n)[:] = source
    assert torch.equal(cache, want) and not torch.equal(cache, before)


VIEWS = {
    "FlashInfer NHD": ("PSNHC", lambda c: layout.flashinfer(c, "NHD")),
    "FlashInfer HND": ("PSHNC", lambda c: layout.flashinfer(c, "HND")),
    "FlashInfer NHD apart": ("PSNHC", lambda c: layout.flashinfer((c[:, 0], c[:, 1]), "NHD")),
    "FlashInfer HND apart": ("PSHNC", lambda c: layout.flashinfer((c[:, 0], c[:, 1]), "HND")),
    "FlashAttention paged": ("SPNHC", lambda c: layout.flash_attention(c[0], c[1])),
    "TensorRT-LLM": ("PSHNC", layout.tensorrt_llm),
    "vLLM kv_first": ("SPNHC", lambda c: layout.vllm(c, "kv_first")),
    "vLLM blocks_first": ("PSNHC", lambda c: layout.vllm(c, "blocks_first")),
    "vLLM packed": ("PHNC", lambda c: layout.vllm(c, "packed")),
} | {
    f"vLLM {name}": (name.replace("B", "P"), lambda c, name=name: layout.vllm(c, name))
    for name in ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
}


@pytest.mark.parametrize("to", ["front", "back"])
@pytest.mark.parametrize("name", VIEWS)
def test_round_trip(name: str, to: str) -> None:
    axes, view_of = VIEWS[name]
    cache = cache_of(axes)
    check_round_trip(cache, axes, list(view_of(cache)), to)


def test_round_trip_of_token_pools() -> None:
    """SGLang: the rows of req_to_token are tables of pages of one token."""
    k, v = rows_of([40, H, D], torch.int16, 1), rows_of([40, H, D], torch.int16, 2)
    before = k.clone(), v.clone()
    slots = torch.randperm(40)[:24].view(2, 12)
    index = lkv_ext.evict_paged_(list(layout.sglang(k, v)), torch.rand(2, H, 12), 5, slots, to="back", check=True)
    assert index.free_pages.tolist() == [7, 7]
    positions = index.positions.view(2, H, 5).long()
    for b in range(2):
        for h in range(H):
            for now, old in ((k, before[0]), (v, before[1])):
                assert torch.equal(now[slots[b, 7:], h], old[slots[b, positions[b, h]], h])
    others = torch.ones(40, dtype=torch.bool).index_fill(0, slots[:, 7:].flatten(), False)
    assert torch.equal(k[others], before[0][others]) and torch.equal(v[others], before[1][others])


def test_dense_caches() -> None:
    k, v = rows_of([2, 12, H, D], torch.int16, 1), rows_of([2, 12, H, D], torch.int16, 2)
    copies = [t.transpose(1, 2).contiguous() for t in (k, v)]
    scores = torch.rand(2, H, 12)
    lkv_ext.evict_(*layout.flash_attention(k, v), scores, 5, to="back")
    lkv_ext.evict_(*layout.hugging_face(*copies), scores, 5, to="back")
    assert torch.equal(k.transpose(1, 2), copies[0]) and torch.equal(v.transpose(1, 2), copies[1])


@pytest.mark.parametrize("to", ["front", "back"])
@pytest.mark.parametrize("packed", [False, True])
def test_heads_as_sequences(packed: bool, to: str) -> None:
    """Ragged budgets free pages of single heads, and one KV head per sequence reads what is left."""
    cache = cache_of("PHNC") if packed else rows_of([P, H, N, D], torch.int16, 4)
    pools = list(layout.vllm(cache, "packed")) if packed else [cache]
    own, tables = layout.heads_as_sequences(pools, TABLES)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(own, pools, strict=True))
    assert tables.shape == (2, H, 3) and tables[1, :, 2].tolist() == [-1] * H
    shared = [pool.clone() for pool in pools]
    scores, budgets = torch.rand(2, H, 12), [1, 6, 12]
    index = lkv_ext.evict_paged_(own, scores, budgets, tables, LENGTHS, to=to, check=True)
    together = lkv_ext.evict_paged_(shared, scores, budgets, TABLES, LENGTHS, to=to)
    assert torch.equal(index.positions, together.positions)
    assert all(torch.equal(a, b) for a, b in zip(pools, shared, strict=True))
    assert index.free_pages[0].tolist() == ([2, 1, 0] if to == "front" else [2, 0, 0])
    assert together.free_pages.tolist() == [0, 0]
    for b in range(2):
        for h in range(H):  # as a kernel for pages and one KV head reads it
            for slot in range(int(LENGTHS[b, h])):
                page = own[0].unsqueeze(2)[tables.flatten(0, 1)[b * H + h, slot // N], slot % N, 0]
                assert torch.equal(page, pools[0][TABLES[b, slot // N], h, slot % N])


def test_a_pool_of_all_layers_past_two_gigabytes() -> None:
    """The pages of a layer lie further apart than 2**31 bytes where pages come before layers."""
    from test_layouts import untouched

    layers, step = 2, 2**30 + 64
    memory = untouched(3 * layers * step).view(torch.int8)
    cache = memory.as_strided([3, layers, 1, N, 2 * D], [layers * step, step, 2 * D * N, 2 * D, 1])
    k, v = layout.vllm(cache, "BLHNC")
    assert k[1].stride(0) > 2**31
    for kind, pools in ((0, k), (1, v)):
        for n, pool in enumerate(pools):
            pool[:, 0, :, 0] = torch.arange(12, dtype=torch.int8).view(3, N) + 40 * kind + 20 * n
    tables = torch.tensor([[2, 1, 0]])
    index = lkv_ext.evict_paged_([k, v], torch.rand(layers, 1, 1, 12), 4, tables, to="front")
    tokens = torch.tensor([8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3])
    for kind, pools in ((0, k), (1, v)):
        for n, pool in enumerate(pools):
            kept = tokens[index.positions[4 * n : 4 * n + 4].long()] + 40 * kind + 20 * n
            assert pool[2, 0, :, 0].tolist() == kept.tolist()


WRONG = {
    "rank": (lambda: layout.tensorrt_llm(torch.rand(2, 2, 3)), r"cache with axes PSHNC, got shape \[2, 2, 3\]"),
    "no pair": (lambda: layout.vllm(torch.rand(3, 5, 4, 2, 8), "kv_first"), "an axis of two, K and V, got 3"),
    "odd content": (lambda: layout.vllm(torch.rand(3, 5, 4, 7), "packed"), "K beside V in an even number"),
    "dim": (lambda: layout.view(torch.rand(3, 5, 4, 8), "PHNC", dim=8), r"dim in \[1, 8\)"),
    "axes": (lambda: layout.view(torch.rand(3, 5, 4, 8), "PHNX"), "axes P, H, N and C"),
    "axes twice": (lambda: layout.view(torch.rand(3, 5, 4, 8), "PHNN"), "axes P, H, N and C"),
    "a name of vLLM": (lambda: layout.vllm(torch.rand(3, 5, 4, 8), "NHD"), "layout of kv_first, blocks_first, packed"),
    "a name of FlashInfer": (lambda: layout.flashinfer(torch.rand(3, 2, 5, 4, 8), "nhd"), "'NHD' or 'HND'"),
    "dense": (lambda: layout.flash_attention(torch.rand(3, 5, 8), torch.rand(3, 5, 8)), r"\[P, page, H, D\]"),
    "tokens": (lambda: layout.sglang(torch.rand(3, 5), torch.rand(3, 5)), r"\[slots, H, D\]"),
    "rows outside of heads": (
        lambda: layout.heads_as_sequences([torch.rand(3, 4, 2, 8).transpose(1, 2)], TABLES), "evenly over all pages"
    ),
    "K and V between pages and heads": (
        lambda: layout.heads_as_sequences(layout.flashinfer(torch.rand(3, 2, 2, 4, 8), "HND"), TABLES), "evenly"
    ),
    "pools of other heads": (
        lambda: layout.heads_as_sequences([torch.rand(3, 4, 2, 8), torch.rand(3, 2, 2, 8)], TABLES), r"\[P, 4, page"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=rf"lkv_ext\.layout: expected .*{message}"):
        call()
