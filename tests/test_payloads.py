"""Payloads of several types whose bytes lie between each other in one buffer: read and written like any others."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import bits, check, check_index, expected, rows_of, scores_of, storage_bytes, twins
from torch import Tensor

import lkv_ext
import lkv_ext.numpy as lkv_numpy
from lkv_ext._torch.library import ops

B, H, L, ROW = 2, 3, 21, 32  # bytes of a token of one head, all payloads and gaps
# For every payload its type and, in its row, the first byte and the elements. Neighbours touch.
LAYOUTS = {
    "float32, uint8": [(torch.float32, 0, 4), (torch.uint8, 16, 7)],
    "uint8, float32": [(torch.uint8, 0, 4), (torch.float32, 4, 3)],
    "uint8 on both sides": [(torch.float32, 8, 2), (torch.uint8, 16, 3), (torch.uint8, 7, 1)],
    "of four sizes": [(torch.float64, 8, 1), (torch.uint8, 16, 1), (torch.int16, 18, 1), (torch.float32, 20, 2)],
    "float8, float32": [(torch.float8_e4m3fn, 1, 7), (torch.float32, 8, 6)],
    "to the end": [(torch.float32, 0, 7), (torch.uint8, 28, 4)],
}
ORDERS = ((0, 1, 2), (0, 2, 1), (2, 0, 1))  # of batch, head and token in memory


def interleaved(parts: list[tuple[torch.dtype, int, int]], order: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    """`[B, H, L, n]` each, views of one buffer in which the axes have this order."""
    shape = [(B, H, L)[axis] for axis in order]
    buffer = rows_of([*shape, ROW], torch.uint8, 5).permute(*(order.index(axis) for axis in range(3)), 3)
    views = []
    for dtype, first, count in parts:
        aligned = buffer if dtype.itemsize == 1 else buffer.view(dtype)
        begin = first // dtype.itemsize
        view = aligned[..., begin : begin + count]
        views.append(view.view(dtype) if dtype.itemsize == 1 else view)
    return views


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("parts", LAYOUTS.values(), ids=LAYOUTS)
def test_all_that_moves_rows(parts: list, order: tuple[int, ...]) -> None:
    payload, scores = interleaved(parts, order), scores_of("ties", [B, H, L])
    k, v, *companions = payload
    budgets = [3, 21, 8]
    want = expected(payload, scores, budgets, reserve=2)
    out = lkv_ext.evict(k, v, scores, budgets, companions=companions, reserve=2)
    check(out, want)
    check(lkv_ext.evict(k, v, scores, budgets, companions=companions, reserve=2, out=out), want)
    moved = lkv_ext.gather(payload, lkv_ext.select(scores, budgets, reserve=2))
    assert all(torch.equal(bits(a), b) for a, b in zip(moved, want.tensors, strict=True))
    layers = lkv_ext.evict_layers([k, k], [v, v], [scores] * 2, [budgets] * 2, companions=[[c, c] for c in companions])
    alone = lkv_ext.evict(k, v, scores, budgets, companions=companions)
    for i in range(2):
        span = slice(int(layers.layer(i).cu_seqlens[0]), int(layers.layer(i).cu_seqlens[-1]))
        assert torch.equal(bits(layers.k[span]), bits(alone.k)) and torch.equal(bits(layers.v[span]), bits(alone.v))
    cache = lkv_ext.RaggedCache(out, L)
    cache.append(k[:, :, :5], v[:, :, :5], [c[:, :, :5] for c in companions])  # what watches caches compares the rows

    mine, theirs = twins(payload), twins(payload)
    index = lkv_ext.evict_(mine[0], mine[1], scores, budgets, companions=mine[2:])
    check_index(index, expected(theirs, scores, budgets, in_place=True))
    assert torch.equal(storage_bytes(mine[0]), storage_bytes(theirs[0])), "the gaps too"


def test_axes_of_one_element_have_any_stride() -> None:
    """No step is made along them: rows of one element far apart, and an output of one row."""
    k, scores = torch.randn(B, H, L, 5)[..., 1::5], scores_of("ties", [B, H, L])
    assert k.shape[-1] == 1 and k.stride(-1) == 5
    check(lkv_ext.evict(k, k, scores, 4), expected([k, k], scores, 4))
    mine, theirs = twins([k]), twins([k])
    check_index(lkv_ext.evict_(mine[0], None, scores, 4), expected(theirs, scores, 4, in_place=True))
    assert torch.equal(storage_bytes(mine[0]), storage_bytes(theirs[0]))
    one, ranking = torch.randn(1, 1, L, 4), scores_of("normal", [1, 1, L])
    out = lkv_ext.evict(one, None, -ranking, 1)
    out.k = torch.empty(2, 4)[::2]
    assert out.k.stride() == (8, 1)
    lkv_ext.evict(one, None, ranking, 1, out=out)
    assert torch.equal(out.k[0], one[0, 0, ranking.argmax()])


@pytest.mark.parametrize("parts", [LAYOUTS["float32, uint8"], LAYOUTS["of four sizes"]], ids=len)
def test_numpy(parts: list) -> None:
    payload, scores = interleaved(parts), scores_of("ties", [B, H, L])
    mine, theirs = twins(payload), twins(payload)
    k, v, *companions = (t.numpy() for t in mine)
    want = expected(payload, scores, [3, 21, 8])
    out = lkv_numpy.evict(k, v, scores.numpy(), [3, 21, 8], companions=companions)
    for got, exact in zip((out.k, out.v, *out.companions), want.tensors, strict=True):
        assert np.array_equal(got.view(np.uint8), exact.numpy().view(np.uint8))
    lkv_numpy.evict_(k, v, scores.numpy(), [3, 21, 8], companions=companions)
    expected(theirs, scores, [3, 21, 8], in_place=True)
    assert torch.equal(storage_bytes(mine[0]), storage_bytes(theirs[0]))


@pytest.mark.parametrize(
    "parts",
    [
        [(torch.float32, 0, 4), (torch.uint8, 15, 4)],
        [(torch.uint8, 0, 5), (torch.float32, 4, 2)],
        [(torch.float32, 0, 8), (torch.uint8, 31, 1)],
        [(torch.uint8, 7, 2), (torch.float64, 8, 1)],
        [(torch.float64, 8, 1), (torch.uint8, 9, 1)],
        [(torch.uint8, 9, 1), (torch.float64, 8, 1)],
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_one_byte_in_common(parts: list, order: tuple[int, ...]) -> None:
    k, v = interleaved(parts, order)
    before = storage_bytes(k).clone()
    with pytest.raises(ValueError, match="lkv_ext.evict_: expected k and v without common memory, got overlapping"):
        lkv_ext.evict_(k, v, scores_of("ties", [B, H, L]), 4)
    assert torch.equal(storage_bytes(k), before)


def test_what_is_read_beside_what_is_written() -> None:
    """Scores between the rows; integers and offsets of raw calls in their memory are refused."""
    k, v, ranking = interleaved([(torch.float32, 0, 3), (torch.uint8, 12, 4), (torch.float32, 16, 1)])
    ranking.copy_(scores_of("ties", [B, H, L])[..., None])
    mine, theirs = twins([k, v, ranking]), twins([k, v, ranking])
    check_index(
        lkv_ext.evict_(*mine[:2], mine[2][..., 0], 5), expected(theirs[:2], theirs[2][..., 0], 5, in_place=True)
    )
    assert torch.equal(storage_bytes(mine[0]), storage_bytes(theirs[0]))
    scores, memory = scores_of("ties", [B, H, L]), torch.zeros(B, H, L, 4, dtype=torch.int32)
    inside = memory.view(-1)[8 : 8 + B * H].view(B, H)
    for name in ("budgets", "lengths", "starts"):
        given = {f"{name}_tensor": inside, **({} if name == "budgets" else {"budgets_tensor": inside.clone()})}
        sizes = dict(budgets=[], total=60, count_overflow=True, **given)
        with pytest.raises(RuntimeError, match=re.escape(f"expected payload[0] and {name} without common memory")):
            ops.evict_([memory], [scores], **sizes)
        out = [torch.zeros(60, 4, dtype=torch.int32), *(torch.zeros(n, dtype=torch.int32) for n in (60, B * H, 7, 1))]
        out = [out[0], out[1], out[2].view(B, H), out[3], out[4].view(())]
        given = {key: out[0].view(-1)[: B * H].view(B, H) if t is inside else t for key, t in given.items()}
        with pytest.raises(RuntimeError, match=re.escape(f"expected out[0] and {name} without common memory")):
            ops.evict_out(out, [memory], [scores], **sizes | given)


@pytest.mark.parametrize("flipped", [(0, 1), (1, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_negative_strides(axis: int, flipped: tuple[int, int]) -> None:
    """K | V of one NumPy buffer of which one goes backwards: beside each other, or with a byte in common."""
    buffer = rows_of([B, H, L, ROW], torch.uint8, 3).numpy()
    scores = scores_of("ties", [B, H, L]).numpy()

    def views(memory: np.ndarray, begin: int) -> list[np.ndarray]:
        both = memory[..., :16].view(np.float32), memory[..., begin : begin + 7]
        return [np.flip(x, axis) if flip else x for x, flip in zip(both, flipped, strict=True)]

    mine, theirs = buffer.copy(), [np.ascontiguousarray(x) for x in views(buffer, 16)]
    for x, flat in zip(views(mine, 16), theirs, strict=True):
        assert np.array_equal(x.view(np.uint8), flat.view(np.uint8))
    lkv_numpy.evict_(*views(mine, 16), scores, [3, 21, 8])
    lkv_numpy.evict_(*theirs, scores, [3, 21, 8])
    for x, flat in zip(views(mine, 16), theirs, strict=True):
        assert np.array_equal(x.view(np.uint8), flat.view(np.uint8))
    assert np.array_equal(mine[..., 23:], buffer[..., 23:])
    with pytest.raises(ValueError, match="expected k and v without common memory"):
        lkv_numpy.evict_(*views(mine, 15), scores, 4)


@pytest.mark.parametrize("flipped", [0, 1], ids=["k", "v"])
def test_what_goes_backwards_reaches_down(flipped: int) -> None:
    """K through all of a piece of memory, V at its beginning, at its end, or outside of it."""
    count = B * H * L
    memory = rows_of([24 * count], torch.uint8, 3).numpy()
    scores = scores_of("ties", [B, H, L]).numpy()

    def views(begin: int) -> list[np.ndarray]:
        k, v = memory[4 * count : 20 * count], memory[begin : begin + 4 * count]
        both = [k.view(np.float32).reshape(B, H, L, 4), v.view(np.float32).reshape(B, H, L, 1)]
        both[flipped] = np.flip(both[flipped], (0, 1, 2))
        return both

    for begin in (4 * count, 16 * count, 8 * count, 4, 20 * count - 4):
        with pytest.raises(ValueError, match="expected k and v without common memory"):
            lkv_numpy.evict_(*views(begin), scores, 4)
    for begin in (0, 20 * count):
        mine, theirs = views(begin), [np.ascontiguousarray(x) for x in views(begin)]
        lkv_numpy.evict_(*mine, scores, [3, 21, 8])
        lkv_numpy.evict_(*theirs, scores, [3, 21, 8])
        assert all(a.tobytes() == b.tobytes() for a, b in zip(mine, theirs, strict=True))


def test_elements_that_meet_within() -> None:
    """Strides of NumPy are in bytes: rows of two floats that begin every six."""
    memory = np.zeros(4000, np.uint8)
    k = np.lib.stride_tricks.as_strided(memory.view(np.float32), (1, 2, 9, 2), (400, 200, 6, 4))
    with pytest.raises(ValueError, match="expected k with memory of its own for every element"):
        lkv_numpy.evict_(k, None, np.zeros((1, 2, 9), np.float32), 4)
    assert not memory.any()


def test_strides_that_take_too_long_to_tell() -> None:
    """Whether any of these elements is one of the scores takes too many steps to find out: it counts as so."""
    batch, heads, tokens = 30, 19, 12
    memory = rows_of([250_000], torch.int16)
    k = memory.as_strided((batch, heads, tokens, 1), (1874, 3442, 2388, 1), 0)
    scores = memory.view(torch.float16).as_strided((batch, heads, tokens), (1590, 3290, 1406), 1)
    lkv_ext.evict(k, None, scores, 3)
    with pytest.raises(ValueError, match="lkv_ext.evict_: expected k and scores without common memory"):
        lkv_ext.evict_(k, None, scores, 3)
