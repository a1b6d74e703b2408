"""RaggedCache as a whole, against a model of it: made of evictions, reordered, padded and stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_model import BATCH, DIM, DIM_V, HEADS, Model, evict, filled, tokens
from cases import generator, scores_of
from invariants import unwatched

import lkv_ext
from lkv import reference
from lkv_ext import RaggedCache


def test_k_and_v_of_different_dtypes(device: str, tmp_path: Path) -> None:
    """As under autocast: a cache moves bytes, each tensor its own."""
    of_v, model = torch.bfloat16, Model()
    cache = RaggedCache.empty(BATCH, HEADS, DIM, dim_v=DIM_V, dtype_v=of_v, device=device, reserve=2)

    def append(n: int, seed: int) -> None:
        k, v = tokens(n, seed)
        cache.append(k.to(device), v.to(device, of_v))
        model.append(k, v.to(of_v))
        model.check(cache)

    append(20, 0)
    evict(cache, model, [10, 3, 20], reserve=1)
    model.check(cache)
    append(1, 1)
    append(5, 2)
    cache.save(tmp_path / "cache")
    cache = RaggedCache.load(tmp_path / "cache", device)
    append(2, 3)
    cache.crop(1)
    for rows in model.rows:
        rows.pop()
    model.seen -= 1
    model.check(cache)
    cache.select_batch([1, 0])
    model.rows = model.rows[HEADS:] + model.rows[:HEADS]
    model.check(cache)
    assert (cache.k.dtype, cache.v.dtype) == (torch.float32, of_v) and "torch.bfloat16" in repr(cache)
    assert cache.nbytes == cache.k.shape[0] * (4 * DIM + 2 * DIM_V)
    assert cache.retained_bytes == sum(map(len, model.rows)) * (4 * DIM + 2 * DIM_V)
    q = torch.randn(BATCH, 2 * HEADS, 1, DIM, generator=generator(0))
    got = cache.attend(q.to(device)).cpu()
    want = reference.attend(q, cache.k.cpu(), cache.v.cpu(), cache.cu_seqlens.cpu(), cache.lengths.cpu())
    assert float((got - want).abs().max()) <= 2e-5
    k, v = (t.to(device) for t in tokens(1))
    with pytest.raises(TypeError, match="expected v of dtype torch.bfloat16, got torch.float32"):
        cache.append(k, v)
    model.check(cache)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_eviction_of_k_and_v_of_different_dtypes(device: str, layout: str) -> None:
    k, v = (t.to(device) for t in tokens(30))
    scores = scores_of("normal", [BATCH, HEADS, 30]).to(device)
    alone = lkv_ext.evict(k, v, scores, [5, 9, 30], layout=layout)
    for types in ((torch.float32, torch.bfloat16), (torch.float16, torch.float64), (torch.uint8, torch.float32)):
        both = lkv_ext.evict(k.to(types[0]), v.to(types[1]), scores, [5, 9, 30], layout=layout)
        assert torch.equal(both.k, alone.k.to(types[0])) and torch.equal(both.v, alone.v.to(types[1]))


def test_takes_over_an_eviction(device: str) -> None:
    k, v = (t.to(device) for t in tokens(30))
    scores = scores_of("ties", [BATCH, HEADS, 30]).to(device)
    cache = RaggedCache(lkv_ext.evict(k, v, scores, [5, 9, 30], reserve=2), 30)
    model = Model()
    model.append(k.cpu(), v.cpu())
    model.evict([scores[r // HEADS, r % HEADS].cpu() for r in range(BATCH * HEADS)], [5, 9, 30])
    model.check(cache)
    more = tokens(2, 7)
    before = cache.k.data_ptr()
    cache.append(*(t.to(device) for t in more))
    model.append(*more)
    model.check(cache)
    assert cache.k.data_ptr() == before


def test_spans_cut_by_capacity_have_no_slack() -> None:
    k, v = tokens(30)
    kv = lkv_ext.evict(k, v, k[..., 0], [9, 9, 9], reserve=4, capacity=70)
    cache, lengths = RaggedCache(kv, 30), kv.lengths.clone()
    cache.append(*tokens(1))
    assert torch.equal(cache.lengths, lengths + 1)


def test_select_batch_and_reorder(device: str) -> None:
    cache, model = filled(device)
    evict(cache, model, [7, 2, 11])
    cache.reorder([1, 1])
    model.rows = [list(model.rows[HEADS + h]) for _ in range(2) for h in range(HEADS)]
    model.check(cache)
    more = tokens(70)
    cache.append(*(t.to(device) for t in more))
    model.append(*more)
    model.check(cache)
    cache.select_batch(torch.tensor([1], device=device))
    assert cache.batch == 1 and cache.lengths.flatten().tolist() == [len(rows) for rows in model.rows[HEADS:]]
    with pytest.raises(ValueError, match=r"expected indices of sequences in \[0, 1\)"):
        cache.select_batch([1])
    for nested in ([[0]], torch.tensor([[0]], device=device)):
        with pytest.raises(ValueError, match=r"expected indices as a list of integers, got shape \[1, 1\]"):
            cache.select_batch(nested)


@pytest.mark.parametrize("align", [4, 16])
def test_spans_stay_aligned(device: str, align: int, tmp_path: Path) -> None:
    """Whatever happens to a cache, its buffers are pages of `align` rows, and the block table names those of a head."""

    def check(cache: RaggedCache, model: Model) -> None:
        model.check(cache)
        assert cache.align == align and not (cache.cu_seqlens % align).any() and len(cache.k) % align == 0
        pools, table = cache.k.view(-1, align, 1, DIM), cache.block_table
        assert table.shape == (BATCH * HEADS, -(-cache.max_length // align)) and table.dtype == torch.int32
        for r, rows in enumerate(model.rows):
            mine = pools[table[r].long()].flatten(0, 1)[: len(rows), 0].cpu()
            assert torch.equal(mine, torch.stack([k for _, k, _ in rows])) if rows else True

    cache, model = RaggedCache.empty(BATCH, HEADS, DIM, dim_v=DIM_V, device=device, reserve=3, align=align), Model()
    for seed, n in enumerate((3, 1, 20, 1)):
        k, v = tokens(n, seed)
        cache.append(k.to(device), v.to(device))
        model.append(k, v)
        check(cache, model)
    for budgets in ([10, 3, 20], [4, 0, 9]):
        evict(cache, model, budgets, reserve=1)
        check(cache, model)
    k, v = tokens(5)
    cache.append(k.to(device), v.to(device))
    model.append(k, v)
    cache.select_batch([1, 0])
    model.rows = model.rows[HEADS:] + model.rows[:HEADS]
    check(cache, model)
    pytest.importorskip("safetensors")
    cache.save(tmp_path / "cache.safetensors")
    check(RaggedCache.load(tmp_path / "cache.safetensors", device), model)
    assert filled(device)[0].block_table is None


def test_inference_mode_may_change(device: str) -> None:
    """What was made in inference mode can be written to outside, and the other way round."""
    k, v = (t.to(device) for t in tokens(30))
    with torch.inference_mode():
        made = RaggedCache.empty(BATCH, HEADS, DIM, dim_v=DIM_V, device=device, reserve=1)
        made.append(k.clone(), v.clone())
        taken = RaggedCache(lkv_ext.evict(k, v, k[..., 0], [5, 9, 30], reserve=40, companions=[k]), 30)
    taken.append(k[:, :, :2], v[:, :, :2], companions=[k[:, :, :2]])
    for cache in (made, taken):
        more = [k[:, :, :3]] if cache.companions else []
        with torch.inference_mode():
            cache.append(k[:, :, :3], v[:, :, :3], companions=more)
            cache.crop(1)
            cache.evict(cache.packed(torch.rand(BATCH, HEADS, cache.max_length, device=device)), 4)
            cache.select_batch([1, 0])
        cache.append(k[:, :, :3], v[:, :, :3], companions=more)
        assert cache.lengths.tolist() == [[7] * HEADS] * BATCH


def test_padded_and_packed(device: str) -> None:
    cache, model = filled(device)
    evict(cache, model, [7, 2, 11])
    dense = cache.padded(cache.k)
    assert dense.shape == (BATCH, HEADS, cache.max_length, DIM)
    for r, rows in enumerate(model.rows):
        for i, (_, k, _) in enumerate(rows):
            assert torch.equal(dense[r // HEADS, r % HEADS, i].cpu(), k)
    back = cache.packed(dense[..., 0])
    for r, rows in enumerate(model.rows):
        begin = int(cache.cu_seqlens[r])
        assert torch.equal(back[begin : begin + len(rows)], cache.k[begin : begin + len(rows), 0])


def test_bytes() -> None:
    cache, model = filled()
    evict(cache, model, [7, 2, 11], reserve=3)
    row = 4 * (DIM + DIM_V)
    assert cache.retained_bytes == 2 * 20 * row and cache.nbytes == (2 * 20 + 6 * 3) * row


def test_save_and_load(device: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    cache, model = filled(device)
    evict(cache, model, [7, 2, 11])
    cache.save(tmp_path / "cache.safetensors")
    again = RaggedCache.load(tmp_path / "cache.safetensors", device)
    model.check(again)
    more = tokens(100)
    again.append(*(t.to(device) for t in more))
    model.append(*more)
    model.check(again)


def test_load_refuses_other_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a saved cache"):
        RaggedCache.load(tmp_path / "other.safetensors")


def test_padded_spans_are_refused() -> None:
    k, v = tokens(5)
    with pytest.raises(ValueError, match="expected packed k and v of one layer"):
        RaggedCache(lkv_ext.evict(k, v, k[..., 0], 2, layout="padded"), 5)


def test_everything_moves_to_another_device() -> None:
    scores = torch.rand(1, 2, 8)
    kept = lkv_ext.evict(
        torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 3), scores, 3, companions=(scores, scores.long())
    )
    cache = lkv_ext.RaggedCache(kept, 8)
    with unwatched():  # by invariants that read the rows
        cache.to("meta")
    tensors = [cache.k, cache.v, cache.positions, cache.lengths, cache.cu_seqlens, *cache.companions]
    assert len(cache.companions) == 2 and all(t.is_meta for t in tensors)
