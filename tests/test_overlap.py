"""Memory of the ops that write: what overlaps is refused untouched, what only interleaves is not."""

from __future__ import annotations

import re

import pytest
import torch
from cases import bits, check, check_index, expected, payload_of, rows_of, scores_of, storage_bytes, twins
from torch import Tensor

import lkv_ext

B, H, L, D = 2, 3, 10, 8


def memory(elements: int = 4096) -> Tensor:
    return rows_of([elements], torch.bfloat16)


def view(storage: Tensor, strides: tuple[int, ...], offset: int = 0, dim: int = D) -> Tensor:
    return storage.as_strided((B, H, L, dim), strides, offset)


NESTED = (H * L * D, L * D, D, 1)


@pytest.mark.parametrize(
    "k, v",
    [
        ((NESTED, 0), (NESTED, 0)),
        ((NESTED, 0), (NESTED, B * H * L * D - 1)),
        ((NESTED, 0), ((1, H * L * D, D, 1), B * H * L * D)),  # v overlaps itself: sequences one element apart
        (((0, L * D, D, 1), 0), (NESTED, 2000)),
        (((H * L * D, 0, D, 1), 0), (NESTED, 2000)),
        (((H * L * D, L * D, D - 1, 1), 0), (NESTED, 2000)),
        (((960, 320, 16, 1), 0), ((960, 320, 16, 1), 7)),  # K | V halves that meet in one element
    ],
)
def test_overlap_in_place(k: tuple, v: tuple) -> None:
    storage = memory()
    before = storage.clone()
    with pytest.raises(ValueError, match=r"^lkv_ext\.evict_: expected [kv].*, got overlapping "):
        lkv_ext.evict_(view(storage, *k), view(storage, *v), scores_of("normal", [B, H, L]), 4)
    assert torch.equal(bits(storage), bits(before))


@pytest.mark.parametrize(
    "k, v",
    [
        (((960, 320, 16, 1), 0), ((960, 320, 16, 1), 8)),  # [B, H, L, K | V]
        (((480, 16, 48, 1), 0), ((480, 16, 48, 1), 8)),  # [B, L, H, K | V]
        (((960, 160, 8, 1), 0), ((960, 160, 8, 1), 80)),  # [B, H, 2, L, D]
        (((480, 8, 48, 1), 0), ((480, 8, 48, 1), 24)),  # [B, L, 2, H, D]
        ((NESTED, 0), (NESTED, B * H * L * D)),
    ],
)
def test_interleaved_in_place(k: tuple, v: tuple) -> None:
    storage, scores = memory(), scores_of("ties", [B, H, L])
    payload = [view(storage, *k), view(storage, *v)]
    mine, theirs = twins(payload), twins(payload)
    check_index(lkv_ext.evict_(*mine, scores, [1, 4, 9]), expected(theirs, scores, [1, 4, 9], in_place=True))
    assert torch.equal(storage_bytes(mine[0]), storage_bytes(theirs[0]))


def test_what_is_read_may_not_be_written() -> None:
    """In place, scores (also as integers do not overlap) are read while rows move: not in the same memory."""
    storage = rows_of([B * H * L * D], torch.float32)
    k = storage.view(B, H, L, D)
    with pytest.raises(ValueError, match=re.escape("lkv_ext.evict_: expected k and scores without common memory")):
        lkv_ext.evict_(k, None, k[..., 0], 4)
    with pytest.raises(ValueError, match=re.escape("expected k and companions[0] without common memory")):
        lkv_ext.evict_(k, None, scores_of("normal", [B, H, L]), 4, companions=[k[..., 7]])
    scores = scores_of("normal", [B, H, L])
    with pytest.raises(ValueError, match=re.escape("expected companions[0] and scores without common memory")):
        lkv_ext.evict_(k, None, scores, 4, companions=[scores])


def test_offsets_may_not_be_written() -> None:
    """The offsets of ragged input in the memory of the rows that are evicted in place."""
    k = torch.zeros(24, 8)
    offsets = k.view(torch.int32).view(-1)[:4]
    offsets.copy_(torch.tensor([0, 8, 16, 24]))
    with pytest.raises(ValueError, match=r"^lkv_ext.evict_: expected k and cu_seqlens without common memory"):
        lkv_ext.evict_(k, None, torch.zeros(24), 4, cu_seqlens=offsets)
    assert offsets.tolist() == [0, 8, 16, 24]


def test_reading_may_overlap() -> None:
    """Out of place nothing that is given is written: K = V, shared heads and scores inside K are legal."""
    k = rows_of([B, 1, L, D], torch.float32).expand(B, H, L, D)
    check(lkv_ext.evict(k, k, k[..., 0], [1, 2, 3]), expected([k, k], k[..., 0], [1, 2, 3]))


def rows(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def outputs() -> tuple[list[Tensor], Tensor, lkv_ext.RaggedKV]:
    payload = [rows_of([B, H, L, D], torch.bfloat16, 1), rows_of([B, H, L, D], torch.bfloat16, 2)]
    scores = scores_of("normal", [B, H, L])
    return payload, scores, lkv_ext.evict(*payload, scores, 4, companions=[scores])


def refuses(
    out: lkv_ext.RaggedKV, payload: list[Tensor], scores: Tensor, message: str, error: type = ValueError
) -> None:
    written = [t for t in (*payload_of(out), out.positions, out.lengths, out.cu_seqlens, scores) if not t.is_meta]
    before = [storage_bytes(t).clone() for t in written]
    with pytest.raises(error, match="^" + re.escape(f"lkv_ext.evict: {message}")):
        lkv_ext.evict(*payload, scores, 4, companions=[scores], out=out)
    assert all(torch.equal(storage_bytes(t), old) for t, old in zip(written, before, strict=True))


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("k", rows(23, D), ValueError, "contiguous of shape [24, 8], got [23, 8]"),
        ("k", rows(24, D + 1)[:, :D], ValueError, "contiguous of shape [24, 8]"),
        ("k", torch.zeros(24, D), TypeError, "of the dtype of what moves into it"),
        ("k", torch.zeros(24, D).half(), TypeError, "of the dtype of what moves into it"),
        ("positions", ints(48)[::2], ValueError, "contiguous"),
        ("lengths", ints(3, 2).t(), ValueError, "contiguous"),
        ("v", rows(24, D + 1), ValueError, "contiguous of shape [24, 8], got [24, 9]"),
        ("companions", (torch.zeros(24, 1),), ValueError, "contiguous of shape [24], got [24, 1]"),
        ("positions", torch.zeros(24), TypeError, "of dtype int32"),
        ("positions", ints(25), ValueError, "of shape [T'] = [24], got [25]"),
        ("lengths", ints(6), ValueError, "of shape [B, H] = [2, 3], got [6]"),
        ("lengths", ints(2, 3).long(), TypeError, "of dtype int32"),
        ("cu_seqlens", ints(6), ValueError, "of shape [B * H + 1] = [7], got [6]"),
    ],
)
def test_bad_outputs(name: str, value: object, error: type[Exception], message: str) -> None:
    payload, scores, out = outputs()
    setattr(out, name, value)
    called = "companions[0]" if name == "companions" else name
    refuses(out, payload, scores, f"expected out.{called} {message}", error)


def test_outputs_of_another_call() -> None:
    payload, scores, out = outputs()
    out.overflow = ints()
    refuses(out, payload, scores, "expected 6 tensors in out, no overflow, got 7")
    refuses(lkv_ext.evict(*payload, scores, 4), payload, scores, "expected 6 tensors in out, no overflow, got 5")
    fewer = lkv_ext.evict(*payload, scores, 3, companions=[scores])
    refuses(fewer, payload, scores, "expected out.k contiguous of shape [24, 8], got [18, 8]")
    padded = lkv_ext.evict(*payload, scores, 4, companions=[scores], layout="padded")
    refuses(padded, payload, scores, "expected out.k contiguous of shape [24, 8], got [2, 3, 4, 8]")


def test_outputs_that_overlap() -> None:
    payload, scores, out = outputs()
    out.v = out.k
    refuses(out, payload, scores, "expected out.k and out.v without common memory, got overlapping tensors")
    payload, scores, out = outputs()
    out.k = payload[1].flatten()[8 : 8 + 24 * D].view(24, D)
    refuses(out, payload, scores, "expected out.k and v without common memory, got overlapping tensors")
    payload, scores, out = outputs()
    out.companions = (scores.flatten()[:24],)
    refuses(out, payload, scores, "expected out.companions[0] and companions[0] without common memory")
    payload, scores, out = outputs()
    out.positions = out.k.flatten().view(torch.int32)[:24]
    refuses(out, payload, scores, "expected out.k and out.positions without common memory")
