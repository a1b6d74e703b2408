"""Where tensors lie: strides past 2**31, and outputs in the hands of the attention that reads them."""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
import torch
from cases import bits, check_rows, expected, rows_of, scores_of
from torch import Tensor

import lkv_ext

FAR = 2**31 + 4096


def untouched(nbytes: int) -> Tensor:
    """Zeros that take address space and no memory until they are written."""
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000)  # the name is there since Python 3.13
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | unreserved), dtype=torch.uint8)


# Which axis of [B, H, L, D] has the stride that no int32 holds, in elements of two bytes.
FAR_AWAY = {
    "sequences": (FAR, 9 * 64, 64),
    "heads": (9 * 64, FAR, 64),
    "tokens": (64, 2 * 64, FAR // 4),
}


@pytest.mark.parametrize("strides", FAR_AWAY.values(), ids=FAR_AWAY)
def test_far_strides(strides: tuple[int, int, int]) -> None:
    shape = (2, 2, 9, 16)
    reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=False)) + 64
    k, v = (t.as_strided(shape, (*strides, 1)) for t in (untouched(2 * reach).view(torch.bfloat16) for _ in range(2)))
    scores = untouched(4 * reach).view(torch.float32).as_strided(shape[:3], strides)
    k.copy_(rows_of(shape, torch.int16, 1).view(torch.bfloat16))
    v.copy_(rows_of(shape, torch.int16, 2).view(torch.bfloat16))
    scores.copy_(scores_of("ties", shape[:3]))
    near = [t.contiguous() for t in (k, v)]
    want = expected(near, scores.contiguous(), [3, 7], sink=1)

    out = lkv_ext.evict(k, v, scores, [3, 7], sink=1)
    assert torch.equal(out.positions, want.positions)
    check_rows([out.k, out.v], want.tensors)

    lkv_ext.evict_(k, v, scores, [3, 7], sink=1)
    for mine, was, kept in zip((k, v), near, want.tensors, strict=True):
        first = [h for sequence in mine for h in sequence]
        rest = [h for sequence in was for h in sequence]
        begins = want.cu_seqlens.tolist()
        for i, (row, old) in enumerate(zip(first, rest, strict=True)):
            n = begins[i + 1] - begins[i]
            assert torch.equal(bits(row)[:n], kept[begins[i] : begins[i + 1]])
            assert torch.equal(bits(row)[n:], bits(old)[n:])


def test_ragged_input_past_two_gigabytes() -> None:
    """Segments that begin past 2**31 bytes of a ragged cache."""
    tokens, dim = 2**22, 1024
    k = untouched(tokens * dim).view(torch.int8).view(tokens, dim)
    scores = untouched(4 * tokens).view(torch.float32)
    begin = tokens - 100
    k[begin:] = rows_of([100, dim], torch.int8)
    scores[begin:] = scores_of("normal", [100])
    cu_seqlens = torch.tensor([begin, begin + 60, tokens], dtype=torch.int32)
    out = lkv_ext.evict(k, None, scores, [20, 30], cu_seqlens=cu_seqlens)
    near = torch.tensor([0, 60, 100], dtype=torch.int32)
    want = expected([k[begin:]], scores[begin:], [[20, 30]], cu_seqlens=near, shape=(1, 2))
    assert torch.equal(out.positions, want.positions)
    check_rows([out.k], want.tensors)


def attention(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query per segment, `[D]` each, over its rows."""
    return torch.softmax(k @ query / query.shape[-1] ** 0.5, 0) @ v


@pytest.fixture
def evicted() -> dict:
    g = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 3, 60, 16, generator=g), torch.randn(2, 3, 60, 16, generator=g)
    scores, query = torch.randn(2, 3, 60, generator=g), torch.randn(2, 3, 16, generator=g)
    budgets = [[20, 1, 33], [16, 48, 60]]
    index = lkv_ext.select(scores, budgets, layout="padded")
    mask = torch.zeros(2, 3, 61, dtype=torch.bool)
    mask.scatter_(2, torch.where(index.positions < 0, 60, index.positions).long(), True)
    logits = (k @ query[..., None])[..., 0] / 4
    masked = logits.masked_fill(~mask[..., :60], -torch.inf).softmax(-1)
    return dict(k=k, v=v, scores=scores, budgets=budgets, query=query, dense=(masked[:, :, None] @ v)[:, :, 0])


def test_packed_rows_are_varlen_sequences(evicted: dict) -> None:
    """cu_seqlens without reserve delimit exactly the kept rows, as varlen attention reads them."""
    out = lkv_ext.evict(evicted["k"], evicted["v"], evicted["scores"], evicted["budgets"])
    assert out.cu_seqlens.diff().tolist() == out.lengths.flatten().tolist()
    begins = out.cu_seqlens.tolist()
    rows = [slice(*pair) for pair in pairwise(begins)]
    answers = [attention(q, out.k[r], out.v[r]) for q, r in zip(evicted["query"].flatten(0, 1), rows, strict=True)]
    torch.testing.assert_close(torch.stack(answers).view(2, 3, 16), evicted["dense"])


@pytest.mark.parametrize("reserve", [0, 20])
def test_aligned_spans_are_pages(evicted: dict, reserve: int) -> None:
    """A pool of single-head pages by view; block_table and lengths find every row, and there is slack to append to."""
    page = 16
    out = lkv_ext.evict(evicted["k"], evicted["v"], evicted["scores"], evicted["budgets"], align=page, reserve=reserve)
    pool_k, pool_v = (t.view(-1, page, 1, 16) for t in (out.k, out.v))
    table = out.block_table
    assert table.dtype == torch.int32 and table.shape[0] == 6
    lengths = out.lengths.flatten().tolist()
    answers, used = [], []
    for query, pages, length in zip(evicted["query"].flatten(0, 1), table, lengths, strict=True):
        k, v = (pool[pages.long(), :, 0].flatten(0, 1)[:length] for pool in (pool_k, pool_v))
        answers.append(attention(query, k, v))
        used += pages[: -(-(length + reserve) // page)].tolist()
    torch.testing.assert_close(torch.stack(answers).view(2, 3, 16), evicted["dense"])
    assert len(used) == len(set(used)) and int(table.max()) < pool_k.shape[0]


def test_reserve_is_room_to_append(evicted: dict) -> None:
    """Rows written behind the kept ones, as decoding does, are evicted with them the next time."""
    out = lkv_ext.evict(
        evicted["k"], None, evicted["scores"], evicted["budgets"], reserve=2, companions=[evicted["scores"]]
    )
    at = (out.cu_seqlens[:-1] + out.lengths.flatten()).long()
    new = torch.arange(6 * 16, dtype=torch.float32).view(6, 16)
    out.k[at], out.companions[0][at] = new, torch.full((6,), 99.0)
    again = lkv_ext.evict(
        out.k, None, out.companions[0], 1, cu_seqlens=out.cu_seqlens, lengths=out.lengths + 1, reserve=1
    )
    assert torch.equal(again.k[::2], new) and not again.k[1::2].any()
    assert torch.equal(again.positions[::2], out.lengths.flatten())


def test_transposed_caches_are_not_copied(evicted: dict) -> None:
    """[B, L, H, D] goes in as a view: in place, the rows of the other layout move."""
    k = evicted["k"].transpose(1, 2).contiguous()
    want = lkv_ext.evict(evicted["k"], None, evicted["scores"], 10)
    lkv_ext.evict_(k.transpose(1, 2), None, evicted["scores"], 10)
    assert torch.equal(k[:, :10].transpose(1, 2).reshape(-1, 16), want.k)
