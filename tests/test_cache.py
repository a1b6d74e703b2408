"""The rows of a RaggedCache, against a model of them: appended, attended to, evicted and taken back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cache_model import BATCH, DIM, DIM_V, HEADS, Model, evict, filled, tokens
from cases import generator

import lkv_ext
from lkv_ext import RaggedCache


def test_append_grows(device: str) -> None:
    cache, model = filled(device)
    model.check(cache)


def test_append_in_place(device: str) -> None:
    """Within the slack nothing is reallocated; beyond it, reallocations become rare."""
    cache = RaggedCache.empty(BATCH, HEADS, DIM, dim_v=DIM_V, device=device, reserve=2)
    places = []
    k, v = (t.to(device) for t in tokens(1))
    for _ in range(1000):
        cache.append(k, v)
        places.append(cache.k.data_ptr())
    moves = sum(a != b for a, b in pairwise(places))
    assert moves <= 9  # 2, 4, 8, ... rows of slack
    assert cache.lengths.unique().tolist() == [1000]


def test_evict_again_and_again(device: str) -> None:
    cache, model = filled(device)
    for budgets in ([10, 3, 20], [4, 0, 9], [50, 50, 50]):
        evict(cache, model, budgets, reserve=1)
        model.check(cache)
        for seed in range(2):
            k, v = tokens(3, seed)
            cache.append(k.to(device), v.to(device))
            model.append(k, v)
            model.check(cache)


@pytest.mark.parametrize("on_device", [False, True])
def test_padding_on_the_left(device: str, on_device: bool) -> None:
    cache, model = RaggedCache.empty(BATCH, HEADS, DIM, dim_v=DIM_V, device=device, reserve=8), Model()
    for n, valid in ((4, [0, 3]), (5, [2, 5]), (1, None)):
        k, v = tokens(n)
        given = None if valid is None else torch.tensor(valid, device=device) if on_device else valid
        cache.append(k.to(device), v.to(device), valid=given)
        model.append(k, v, valid)
    model.check(cache)
    q = torch.randn(BATCH, HEADS, 5, DIM, generator=generator(3)).to(device)
    assert cache.attend(q).isfinite().all()


def test_companions_move_along(device: str) -> None:
    k, v = (t.to(device) for t in tokens(12))
    mark = torch.arange(12, device=device, dtype=torch.float64).expand(BATCH, HEADS, 12).contiguous()
    kv = lkv_ext.evict(k, v, k[..., 0], [3, 12, 0], reserve=1, companions=[mark])
    cache = RaggedCache(kv, 12)
    for place in (12, 13, 14):  # the second one outgrows the slack
        cache.append(k[:, :, :1], v[:, :, :1], [torch.full_like(mark[:, :, :1], place)])
    cache.evict(cache.companions[0].float(), [4, 5, 6])  # scores carried along
    for r in range(BATCH * HEADS):
        begin = int(cache.cu_seqlens[r])
        span = slice(begin, begin + int(cache.lengths.flatten()[r]))
        assert torch.equal(cache.companions[0][span].int(), cache.positions[span])
        assert cache.positions[span][-3:].tolist() == [12, 13, 14]


def test_crop(device: str) -> None:
    cache, model = filled(device)
    cache.crop(2)
    for rows in model.rows:
        del rows[-2:]
    model.seen -= 2
    model.check(cache)
    evict(cache, model, [4, 4, 4])
    more = tokens(3)
    cache.append(*(t.to(device) for t in more))
    cache.crop(3)
    model.check(cache)
    with pytest.raises(ValueError, match=r"RaggedCache.crop: expected at most the 0 tokens .* got 1"):
        cache.crop(1)
    model.check(cache)


@pytest.mark.parametrize("reserve", [1, 64])
def test_restore(device: str, reserve: int) -> None:
    """Appends are taken back, those with padding too, whether or not the buffers had to grow for them."""
    cache, model = filled(device, reserve)
    mark = cache.mark()
    k, v = (t.to(device) for t in tokens(5, 7))
    cache.append(k, v, valid=[2, 0])
    cache.append(k, v)
    with pytest.raises(ValueError, match="restore: expected a mark of at most 35 tokens and rows of 2 sequences"):
        cache.restore(mark, [7])
    cache.restore(mark, [7, 5])
    model.check(cache)
    cache.crop(25)
    assert cache.seen == 0 and cache.max_length == 0


def test_attend_sees_what_was_kept(device: str) -> None:
    cache, model = filled(device)
    evict(cache, model, [7, 2, 11])
    q = torch.randn(BATCH, 2 * HEADS, 1, DIM, generator=generator(5))
    got = cache.attend(q.to(device)).cpu()
    for b in range(BATCH):
        for head in range(2 * HEADS):
            rows = model.rows[b * HEADS + head // 2]
            k, v = (torch.stack([row[i] for row in rows]) for i in (1, 2))
            want = (k @ q[b, head, 0] * DIM**-0.5).softmax(0) @ v
            torch.testing.assert_close(got[b, head, 0], want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda k, v: (k[:1], v[:1]), r"expected k of shape \[B, H, n, ...\] = \[2, 3, 70, 8\], got \[1, 3, 70, 8\]"),
        (lambda k, v: (k, v[:, :, :1]), r"expected v of shape"),
        (lambda k, v: (k[..., :4], v), r"expected k of shape"),
        (lambda k, v: (k.double(), v), r"expected k of dtype torch.float32, got torch.float64"),
        (lambda k, v: (k, v.to("meta")), r"expected v on cpu, got meta"),
        (lambda k, v: (k.requires_grad_(), v), r"requires no gradient"),
        (lambda k, v: (k, v, [k]), r"expected 0 companions, got 1"),
        (lambda k, v: (k[0, 0], v), r"expected k of shape"),
        (lambda k, v: (k.transpose(2, 3).contiguous().transpose(2, 3), v), r"contiguous after the token axis"),
    ],
)
def test_append_refuses(change, message: str) -> None:
    cache, model = filled()
    with pytest.raises((ValueError, TypeError), match=f"lkv_ext.RaggedCache.append: .*{message}"):
        cache.append(*change(*tokens(70)))
    model.check(cache)


def test_append_refuses_wrong_valid() -> None:
    cache, model = filled()
    with pytest.raises(ValueError, match=r"expected valid of shape \[B\] = \[2\], got \[3\]"):
        cache.append(*tokens(1), valid=[1, 1, 1])
    model.check(cache)


def test_evict_refuses_wrong_scores() -> None:
    cache, model = filled()
    with pytest.raises(ValueError, match="expected scores of shape"):
        cache.evict(torch.zeros(3), 4)
    model.check(cache)
