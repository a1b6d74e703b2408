"""Layers of a joint buffer as caches: the same as the same layers evicted alone, whatever `cu_seqlens` begins with."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from cases import generator, scores_of

import lkv_ext
from lkv_ext import RaggedCache

N, B, H, L, D = 3, 2, 2, 30, 4
BUDGETS = [[3, 9], [30, 0], [7, 7]]


def layers() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    g = generator(1)
    ks, vs = ([torch.randn(B, H, L, dim, generator=g) for _ in range(N)] for dim in (D, D + 1))
    return ks, vs, scores_of("ties", [N, B, H, L])


def both(layer: int, reserve: int = 2, **options: int) -> tuple[RaggedCache, RaggedCache]:
    """A layer of the joint buffers, and the same alone; scores are a companion."""
    ks, vs, scores = layers()
    joint = lkv_ext.evict_layers(ks, vs, scores, BUDGETS, reserve=reserve, companions=[list(scores)], **options)
    of = layer % N
    options.pop("capacity", None)
    alone = lkv_ext.evict(ks[of], vs[of], scores[of], BUDGETS[of], reserve=reserve, companions=[scores[of]], **options)
    return RaggedCache(joint.layer(layer), L), RaggedCache(alone, L)


def same(mine: RaggedCache, theirs: RaggedCache) -> None:
    assert torch.equal(mine.lengths, theirs.lengths) and mine.seen == theirs.seen
    assert mine.max_length >= theirs.max_length
    starts = mine.cu_seqlens.tolist(), theirs.cu_seqlens.tolist()
    for a, b, n in zip(starts[0], starts[1], mine.lengths.flatten().tolist(), strict=False):
        for part in ("k", "v", "positions"):
            assert torch.equal(getattr(mine, part)[a : a + n], getattr(theirs, part)[b : b + n])
        for x, y in zip(mine.companions, theirs.companions, strict=True):
            assert torch.equal(x[a : a + n], y[b : b + n])


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("layer", [0, 1, 2, -1])
def test_all_that_happens_to_a_cache(layer: int, align: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    mine, theirs = both(layer, align=align)
    same(mine, theirs)
    assert mine.nbytes == theirs.nbytes and mine.retained_bytes == theirs.retained_bytes
    more = torch.randn(B, H, 2, D), torch.randn(B, H, 2, D + 1), [torch.randn(B, H, 2)]
    for cache in (mine, theirs):
        cache.append(*more)
    same(mine, theirs)
    q = torch.randn(B, 2 * H, 2, D)
    assert torch.equal(mine.attend(q), theirs.attend(q))
    if align > 1:
        rows = mine.k.view(-1, align, D)[mine.block_table.long()].flatten(1, 2)
        for r, n in enumerate(mine.lengths.flatten().tolist()):
            begin = int(mine.cu_seqlens[r])
            assert torch.equal(rows[r, :n], mine.k[begin : begin + n])
    scores = torch.randn(B, H, mine.max_length)
    packed = mine.packed(scores), theirs.packed(scores[:, :, : theirs.max_length])
    assert packed[0].shape == mine.k.shape[:1]
    for (r, a), b in zip(enumerate(mine.cu_seqlens[:-1].tolist()), theirs.cu_seqlens[:-1].tolist(), strict=True):
        n = int(mine.lengths.flatten()[r])
        assert torch.equal(packed[0][a : a + n], scores.view(B * H, -1)[r, :n])
        assert torch.equal(packed[0][a : a + n], packed[1][b : b + n])
    dense = mine.padded(mine.k)
    assert dense.shape == (B, H, mine.max_length, D)
    mine.save(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_size < mine.nbytes + 4 * len(mine.k) + 2000
    for again in (RaggedCache.load(tmp_path / "cache"), pickle.loads(pickle.dumps(mine))):
        same(again, theirs)
    assert len(pickle.dumps(mine)) < mine.nbytes + 4 * len(mine.k) + 4000
    for cache, scores in zip((mine, theirs), packed, strict=True):
        cache.crop(1)
        cache.evict(scores, [2, 5], window=1)
    same(mine, theirs)
    for cache in (mine, theirs):
        cache.append(*(torch.zeros(B, H, 99, d) for d in (D, D + 1)), [torch.zeros(B, H, 99)])
        cache.select_batch([1, 1, 0])
    same(mine, theirs)


def test_layers_do_not_meet() -> None:
    """Appending to one layer leaves the others as they are, with slack and without."""
    ks, vs, scores = layers()
    for reserve in (0, 3):
        joint = lkv_ext.evict_layers(ks, vs, scores, BUDGETS, reserve=reserve)
        caches = [RaggedCache(joint.layer(i), L) for i in range(N)]
        before = [(c.k.clone(), c.positions.clone()) for c in caches]
        caches[1].append(torch.ones(B, H, 2, D), torch.ones(B, H, 2, D + 1))
        for i in (0, 2):
            assert torch.equal(caches[i].k, before[i][0]) and torch.equal(caches[i].positions, before[i][1])


def test_a_buffer_longer_than_its_spans() -> None:
    """`capacity` may leave rows behind the last span, and in front of the first one there may be others' rows."""
    mine, theirs = both(1, capacity=200)
    same(mine, theirs)
    assert mine.nbytes == theirs.nbytes
    out = lkv_ext.evict(torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5), 3)
    shifted = lkv_ext.RaggedKV(
        *(torch.cat([torch.full_like(t[:2], 7), t, torch.full_like(t[:1], 9)]) for t in (out.k, out.v)), (),
        torch.cat([out.positions[:2] * 0, out.positions, out.positions[:1]]), out.lengths, out.cu_seqlens + 2, 3,
    )  # fmt: skip
    cache = RaggedCache(shifted, 5)
    assert torch.equal(cache.k, out.k) and cache.cu_seqlens.tolist() == [0, 3]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cu_seqlens=[0, 5, 4, 6, 8]), "cu_seqlens that rise"),
        (dict(cu_seqlens=[-1, 2, 4, 6, 8]), "cu_seqlens that rise"),
        (dict(cu_seqlens=[0, 2, 4, 6, 9]), "cu_seqlens that rise"),
        (dict(lengths=[[2, 2], [2, 3]]), "lengths of at least 0"),
        (dict(lengths=[[2, 2], [2, -1]]), "lengths of at least 0"),
        (dict(positions=[0, 1, 0, 1, 0, 1, 0, 5]), r"positions of rows in use in \[0, seen\)"),
        (dict(positions=[0, 1, 0, -2, 0, 1, 0, 1]), r"positions of rows in use in \[0, seen\)"),
        (dict(max_length=1), "lengths of at most max_length = 1, got 2"),
        (dict(align=4), "multiples of align = 4"),
        (dict(align=0), "expected align in"),
    ],
)
def test_spans_that_are_none(change: dict, message: str) -> None:
    parts = dict(cu_seqlens=[0, 2, 4, 6, 8], lengths=[[2, 2], [2, 2]], positions=[0, 1] * 4)
    counts = dict(max_length=2, align=1)
    for name, value in change.items():
        (parts if name in parts else counts)[name] = value
    ints = {name: torch.tensor(value, dtype=torch.int32) for name, value in parts.items()}
    kv = lkv_ext.RaggedKV(k=torch.zeros(8, 3), v=torch.zeros(8, 3), companions=(), **ints, **counts)
    with pytest.raises(ValueError, match=f"lkv_ext.RaggedCache: expected {message}|lkv_ext.RaggedCache: .*{message}"):
        RaggedCache(kv, 5)


def test_a_tail_that_is_none() -> None:
    """Only rows of the last tokens can be cropped: those of every head, as far back as all of them go."""
    k = torch.randn(1, 2, 6, D)
    scores = torch.tensor([[[0.0, 9, 0, 1, 2, 3], [9, 0, 0, 1, 2, 3]]])
    kv = lkv_ext.evict(k, k, scores, [4, 3])
    assert kv.positions.tolist() == [1, 3, 4, 5, 0, 4, 5]
    cache = RaggedCache(kv, 6, tail=2)
    cache.crop(2)
    assert cache.lengths.tolist() == [[2, 1]] and cache.seen == 4
    for seen, most in ((6, 2), (7, 0)):
        for tail in (most + 1, 4):
            with pytest.raises(ValueError, match=f"expected tail of at most {most}, .* got {tail}"):
                RaggedCache(kv, seen, tail=tail)
