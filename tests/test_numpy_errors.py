"""Bad input of the NumPy front end: an error that names the argument, before anything is written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_numpy import cache

import lkv_ext.numpy as lkv_np

evict, evict_ = lkv_np.evict, lkv_np.evict_
K, V, SCORES = cache(2, 3, 20, 8)
OUT = lkv_np.evict(K, V, SCORES, 4)
READ_ONLY = K.copy()
READ_ONLY.flags.writeable = False
OFFSETS = np.array([0, 5, 10], np.int32)


def unaligned(array: np.ndarray) -> np.ndarray:
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


UNALIGNED = np.zeros(2 * 3 * 20 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(2, 3, 20)
BAD = {
    "k is a list": (lambda: evict([1], V, SCORES, 4), TypeError, "k as a NumPy array, got list"),
    "k holds objects": (lambda: evict(K.astype(object), V, SCORES, 4), TypeError, "k of a dtype without Python"),
    "k of rank 3": (lambda: evict(K[0], V, SCORES, 4), ValueError, "k of shape [B, H, L, D], got [3, 20, 8]"),
    "v shorter": (lambda: evict(K, V[:, :, :9], SCORES, 4), ValueError, "v of shape [B, H, L, ...] with [2, 3, 20]"),
    "v strided": (lambda: evict(K, V[..., ::2], SCORES, 4), ValueError, "v contiguous after the token axis"),
    "scores of other heads": (
        lambda: evict(K, V, SCORES[:, :1], 4), ValueError, "scores of shape [B, H, L] = [2, 3, 20], got [2, 1, 20]",
    ),
    "scores of float64": (lambda: evict(K, V, SCORES.astype(float), 4), TypeError, "scores of dtype float32"),
    "scores big endian": (lambda: evict(K, V, SCORES.astype(">f4"), 4), TypeError, "scores of dtype float32"),
    "scores unaligned": (lambda: evict(K, V, UNALIGNED, 4), ValueError, "scores aligned to its dtype"),
    "budgets of floats": (lambda: evict(K, V, SCORES, [1.5, 2, 3]), TypeError, "budgets of integers"),
    "budgets of text": (lambda: evict(K, V, SCORES, "4"), TypeError, "budgets as an int"),
    "budgets of four": (lambda: evict(K, V, SCORES, [1, 2, 3, 4]), ValueError, "budgets of shape [H] = [3] or"),
    "lengths of heads": (lambda: evict(K, V, SCORES, 4, lengths=[1, 2, 3]), ValueError, "lengths of shape [B] = [2]"),
    "starts of ragged": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=OFFSETS, starts=1), ValueError, "no starts",
    ),
    "cu_seqlens of int64": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=OFFSETS.astype(np.int64)), TypeError, "dtype int32",
    ),
    "cu_seqlens of floats": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=OFFSETS.astype(np.float32)), TypeError,
        "cu_seqlens of dtype int32, got float32",
    ),
    "cu_seqlens big endian": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=OFFSETS.astype(">i4")), TypeError,
        "cu_seqlens of dtype int32, got another of 4 bytes",
    ),
    "out.positions big endian": (
        lambda: evict(K, V, SCORES, 4, out=replace(OUT, positions=OUT.positions.astype(">i4"))), TypeError,
        "out.positions of dtype int32, got another of 4 bytes",
    ),
    "cu_seqlens unaligned": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=unaligned(OFFSETS)), ValueError,
        "cu_seqlens aligned to its dtype",
    ),
    "cu_seqlens is a list": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=[0, 5, 10]), TypeError,
        "cu_seqlens as a NumPy array, got list",
    ),
    "cu_seqlens of rank 2": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=OFFSETS[None]), ValueError,
        "cu_seqlens of shape [B * H + 1], got [1, 3]",
    ),
    "cu_seqlens of none": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=OFFSETS[:0]), ValueError, "[B * H + 1], got [0]",
    ),
    "k dense beside cu_seqlens": (
        lambda: evict(K, None, SCORES[0, 0], 4, cu_seqlens=OFFSETS), ValueError,
        "k of shape [T, D], got [2, 3, 20, 8]: with cu_seqlens rows are ragged",
    ),
    "v ragged beside dense": (
        lambda: evict(K, V[0, 0], SCORES, 4), ValueError,
        "v of shape [B, H, L, D], got [20, 11]: without cu_seqlens rows are dense",
    ),
    "cu_seqlens of other heads": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], [1, 2, 3], cu_seqlens=OFFSETS), ValueError, "cu_seqlens of shape",
    ),
    "cu_seqlens strided": (
        lambda: evict(K[0, 0], None, SCORES[0, 0], 4, cu_seqlens=np.repeat(OFFSETS, 2)[::2]), ValueError, "contiguous",
    ),
    "layout": (lambda: evict(K, V, SCORES, 4, layout="paged"), ValueError, "layout 'packed' or 'padded'"),
    "negative sink": (lambda: evict(K, V, SCORES, 4, sink=-1), ValueError, "sink, window and reserve >= 0"),
    "sink of half": (lambda: evict(K, V, SCORES, 4, sink=0.5), TypeError, "sink as an int, got 0.5"),
    "align 0": (lambda: evict(K, V, SCORES, 4, align=0), ValueError, "align >= 1"),
    "capacity unaligned": (lambda: evict(K, V, SCORES, 4, align=4, capacity=6), ValueError, "capacity"),
    "threads 0": (lambda: evict(K, V, SCORES, 4, threads=0), ValueError, "threads of at least 1"),
    "companion of other heads": (
        lambda: evict(K, V, SCORES, 4, companions=[K[:, :2]]), ValueError, "companions[0] of shape",
    ),
    "out of another size": (lambda: evict(K, V, SCORES, 5, out=OUT), ValueError, "out.k contiguous of shape [30, 8]"),
    "out of another dtype": (
        lambda: evict(K.astype(np.float16), V, SCORES, 4, out=OUT), TypeError, "out.k of the dtype of what moves",
    ),
    "out is a dict": (lambda: evict(K, V, SCORES, 4, out={}), TypeError, "out as a RaggedKV"),
    "out.k is a list": (
        lambda: evict(K, V, SCORES, 4, out=replace(OUT, k=[1.0])), TypeError, "out.k as a",
    ),
    "out.companions hold objects": (
        lambda: evict(K, V, SCORES, 4, companions=[SCORES], out=replace(OUT, companions=(np.array([None]),))),
        TypeError, "out.companions[0] of a dtype without Python objects",
    ),
    "out.lengths unaligned": (
        lambda: evict(K, V, SCORES, 4, out=replace(OUT, lengths=unaligned(OUT.lengths))), ValueError,
        "out.lengths aligned to its dtype",
    ),
    "out overlaps its source": (
        lambda: evict(OUT.k, OUT.v, OUT.k[:, 0], 4, cu_seqlens=OUT.cu_seqlens, lengths=OUT.lengths, out=OUT),
        ValueError, "out.k and k without common memory",
    ),
    "read-only in place": (lambda: evict_(READ_ONLY, V, SCORES, 4), ValueError, "k writeable, got a read-only"),
    "k is v in place": (lambda: evict_(K, K, SCORES, 4), ValueError, "k and v without common memory"),
    "k reversed is v in place": (lambda: evict_(K, K[:, :, ::-1], SCORES, 4), ValueError, "without common memory"),
    "broadcast in place": (
        lambda: evict_(np.lib.stride_tricks.as_strided(K, K.shape, (0, *K.strides[1:])), V, SCORES, 4),
        ValueError, "memory of its own for every element",
    ),
    "scores of the cache in place": (lambda: evict_(K, None, K[..., 0], 4), ValueError, "without common memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    before = [a.copy() for a in (K, V, SCORES, OUT.k, OUT.positions)]
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert text.startswith("lkv_ext.numpy.evict") and message in text, text
    assert all(np.array_equal(a, b) for a, b in zip(before, (K, V, SCORES, OUT.k, OUT.positions), strict=True))


def test_a_foreign_index_gives_zeros() -> None:
    index = lkv_np.select(SCORES, 4)
    index.positions[:] = [-1, 20, 2**31 - 1, 3] * 6
    moved = lkv_np.gather([K], index)[0].reshape(2, 3, 4, 8)
    assert not moved[:, :, :3].any() and np.array_equal(moved[:, :, 3], K[:, :, 3])
    with pytest.raises(ValueError, match=r"lkv_ext.numpy.gather: expected arrays\[1\] of shape"):
        lkv_np.gather([K, K[:, :, :9]], index)
    for part in ("positions", "lengths", "cu_seqlens"):
        broken = replace(index, **{part: unaligned(getattr(index, part))})
        with pytest.raises(ValueError, match=rf"^lkv_ext.numpy.gather: expected index.{part} aligned to its dtype"):
            lkv_np.gather([K], broken)
