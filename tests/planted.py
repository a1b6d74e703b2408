"""Rows whose scores mislead who looks at a sample of them first, as the CPU kernels do with long rows.

Where they look is no secret: the same places in every call. Run by test_planted.py on every instruction set.
"""

from __future__ import annotations

import torch
from cases import SCORE_DTYPES, check, check_index, expected, generator, place, rows_of, storage_bytes, twins
from test_soft_topk import compare
from torch import Tensor

import lkv_ext

KINDS = ("high", "low", "equal", "equal and high", "equal and low", "nan", "nan between", "infinite", "some high",
         "rest equal", "rest nan", "rest between two", "other half")  # fmt: skip
COUNTS = (2049, 4100, 9001)
LONG = {70_001: "some high", 140_001: "nan between", 300_001: "other half", 600_001: "high"}  # larger samples, too


def sampled(count: int) -> Tensor:
    """The places where a select of `count` competing scores looks first (csrc/cpu/pivot.h)."""
    bits = min(max(count.bit_length() - 8, 9), 12)
    places, stretch = [], count >> bits
    for i in range(1 << bits):
        random = i * 0x9E3779B97F4A7C15 % 2**64
        random = (random ^ random >> 31) * 0xBF58476D1CE4E5B9 % 2**64
        places.append((i * count >> bits) + ((random >> 32) * stretch >> 32))
    return torch.tensor(places)


def blocks(count: int) -> Tensor:
    """The same for a soft_topk (csrc/cpu/soft_topk.cpp)."""
    many = min(max(count // 32, 256), 4096) // 16
    begins = torch.tensor([i * (count - 16) // (many - 1) for i in range(many)])
    return (begins[:, None] + torch.arange(16)).flatten().unique()


def planted(kind: str, count: int, places: Tensor, seed: int = 0) -> Tensor:
    """float32 `[count]`: a sample at `places` is no guide to the rest, or misleads."""
    g = generator(seed + count)
    rest, sample = torch.randn(count, generator=g), torch.randn(len(places), generator=g)
    nan, inf = torch.nan, torch.inf
    every_second = torch.arange(len(places)) % 2 == 0
    if kind == "rest equal":
        rest.fill_(0.25)
    elif kind == "rest nan":
        rest.fill_(nan)
    elif kind == "rest between two":  # of neighbouring keys of the sample
        rest = 0.25 + torch.rand(count, generator=g) * 2.0**-12
        sample = torch.where(every_second, 0.25 - sample.abs(), 0.5 + sample.abs())
    elif kind == "other half":
        rest, sample = -rest.abs(), sample.abs()
    sample = {
        "high": 1000 + sample,
        "low": -1000 + sample,
        "equal": torch.full_like(sample, 0.25),
        "equal and high": torch.full_like(sample, 1000),
        "equal and low": torch.full_like(sample, -1000),
        "nan": torch.full_like(sample, nan),
        "nan between": torch.where(every_second, nan, 1000 + sample),
        "infinite": torch.where(every_second, inf, -inf),
        "some high": torch.where(every_second, 1000 + sample, sample),
    }.get(kind, sample)
    rest[places] = sample
    return rest


def budgets_of(count: int, sample: int) -> list[int]:
    """Around all that a sample may be taken for."""
    near = [n + step for n in (sample, count - sample) for step in (-1, 0, 1)]
    return sorted({1, *near, count // 2, count - 1} & set(range(1, count)))


def select_row(kind: str, count: int, dtype: torch.dtype, variant: int) -> None:
    """The same indices as the reference, with protected ends or without, at other strides too."""
    places = sampled(count)
    sink, window = ((0, 0), (3, 5), (1, 0))[variant % 3]
    row = torch.full((sink + count + window,), -7.0)
    row[sink : sink + count] = planted(kind, count, places)
    budgets = [n + sink + window for n in budgets_of(count, len(places))]
    scores = place(row.to(dtype).expand(1, 2, -1), ("contiguous", "tokens_first")[variant % 2])
    scores = scores[:, :1].expand(1, len(budgets), -1)
    options = dict(sink=sink, window=window)
    check_index(lkv_ext.select(scores, budgets, **options), expected([], scores, budgets, **options))


def select() -> None:
    for count in COUNTS:
        for i, kind in enumerate(KINDS):
            for dtype in SCORE_DTYPES if count == COUNTS[1] else SCORE_DTYPES[i % 3 : i % 3 + 1]:
                select_row(kind, count, dtype, i)


def select_long() -> None:
    for i, (count, kind) in enumerate(LONG.items()):
        select_row(kind, count, SCORE_DTYPES[i % 3], i)


def evict() -> None:
    """The rows too, packed and in place; the segments of a call mislead in different ways."""
    count, kinds = 4100, KINDS
    places = sampled(count)
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.stack([planted(kind, count, places) for kind in kinds])[None].to(dtype)
        payload = [rows_of([1, len(kinds), count, dim], torch.bfloat16, dim) for dim in (3, 8)]
        for kept in (len(places) + 1, count - len(places), count // 2):
            check(lkv_ext.evict(*payload, scores, kept), expected(payload, scores, kept))
            mine, theirs = twins(payload), twins(payload)
            check_index(lkv_ext.evict_(*mine, scores, kept), expected(theirs, scores, kept, in_place=True))
            assert all(torch.equal(storage_bytes(a), storage_bytes(b)) for a, b in zip(mine, theirs, strict=True))


def soft_topk_decided() -> None:
    """As many scores of +inf as k, none of them in the sample: all others are left out, and nothing has a gradient.

    The sample puts the threshold at the higher of two clusters. One step from there, with the infinite scores counted,
    may end where the mask has the right sum, but not the right logarithms.
    """
    for count in (2048, 3001, 9000):
        places, filled = blocks(count), torch.tensor([0.9, 0.94, 0.96, 0.97, 0.98])
        outside = torch.ones(count, dtype=torch.bool)
        outside[places] = False
        for share in (0.02, 0.3):
            k = int(share * count)
            high = (k / count / filled * len(places)).round()[:, None]  # how many of the sample
            scores = torch.zeros(len(filled), count)
            scores[:, places] = torch.where(torch.arange(len(places)) < high, 40.0, 0.0)
            scores[:, outside.nonzero().flatten()[:k]] = torch.inf
            scores.requires_grad_()
            for log in (False, True):
                mask = lkv_ext.soft_topk(scores, float(k), 0.1, log=log)
                kept, left = (0.0, -1e4) if log else (1.0, 0.0)
                assert torch.equal(mask, torch.where(scores == torch.inf, kept, left))
                assert not torch.autograd.grad(mask.sum(), scores)[0].any()


def soft_topk() -> None:
    """The same masks and gradients as the reference."""
    for count in (2047, 2048, 3001, 9000):
        places = blocks(max(count, 2048))
        places = places[places < count]
        for i, kind in enumerate((*KINDS, "huge")):
            scores = planted("high" if kind == "huge" else kind, count, places)
            if kind == "huge":
                scores[places] = 3e38
            scores = scores.clamp(-30, 30) if i % 2 and kind != "huge" else scores
            many = int(scores.isfinite().sum())
            compare(
                scores.expand(3, -1).contiguous(),
                torch.tensor([0.04, 0.5, 0.97]) * many + (scores == torch.inf).sum(),
                (0.5, 0.05)[i % 2],
                bool(i // 2 % 2),
            )
