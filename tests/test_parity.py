"""Every op against the reference: positions, lengths, offsets, overflow and bytes, exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    PLACEMENTS,
    SCORE_DTYPES,
    SCORES,
    bits,
    check,
    check_index,
    check_rows,
    expected,
    place,
    rows_of,
    scores_of,
    spread,
    storage_bytes,
    twins,
    unreadable,
)

import lkv_ext
from lkv import reference

SPANS = (
    dict(),
    dict(layout="padded"),
    dict(reserve=3, align=16),
    dict(layout="padded", reserve=1, align=8),
    dict(capacity=96),
    dict(capacity=96, reserve=5, align=4),
    dict(layout="padded", capacity=24),
    dict(max_budget=20),
    dict(sink=4, window=16),
    dict(sink=400, window=400),
)
BUDGETS = [[40, 0, 300], [7, 64, 1]]


def cache(device: str, tokens: int = 257, dim: int = 24, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    k = rows_of([2, 3, tokens, dim], dtype, 1)
    v = rows_of([2, 3, tokens, dim // 2 + 1], dtype, 2)
    companion = rows_of([2, 3, tokens], torch.int64, 3)
    return [t.to(device) for t in (k, v, companion)]


def ragged_cache(device: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """[T, ...] of 2 x 3 spans of 0 to 300 rows, with rows before the first span and after the last."""
    spans = torch.tensor([5, 0, 300, 17, 128, 64, 1])
    cu_seqlens = spans.cumsum(0).int()
    total = int(cu_seqlens[-1]) + 9
    payload = [rows_of([total, 40], torch.bfloat16, 1), rows_of([total, 3], torch.float32, 2)]
    scores = scores_of("ties", [total], 4)
    return [t.to(device) for t in payload], scores.to(device), cu_seqlens.to(device)


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_evict(device: str, span: dict, placement: str) -> None:
    payload = [place(t, placement) for t in cache(device)]
    scores = place(scores_of("ties", [2, 3, 257]).to(device), placement)
    options = dict(lengths=[[200, 0, 257], [9, 300, 256]], starts=[57, 0]) | span
    out = lkv_ext.evict(*payload[:2], scores, BUDGETS, companions=payload[2:], **options)
    assert out.overflow is None
    check(out, expected(payload, scores, BUDGETS, **options))


@pytest.mark.parametrize("widths", [(28, 0), (0, 28), (8, 0, 3)], ids=str)
def test_rows_without_bytes(device: str, widths: tuple[int, ...]) -> None:
    """Beside others: a tensor of no elements has no memory that could be read."""
    payload = [rows_of([2, 3, 60, width], torch.bfloat16, width).to(device) for width in widths]
    scores = scores_of("normal", [2, 3, 60]).to(device)
    out = lkv_ext.evict(*payload[:2], scores, [5, 40, 17], companions=payload[2:], reserve=2)
    check(out, expected(payload, scores, [5, 40, 17], reserve=2))


@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("tokens", [1, 7, 64, 1000, 5000])
def test_scores(device: str, kind: str, dtype: torch.dtype, tokens: int) -> None:
    scores = scores_of(kind, [2, 4, tokens]).to(dtype).to(device)
    for options in (dict(), dict(sink=3, window=2), dict(starts=[tokens // 3, 0])):
        budgets = [tokens // 7, tokens // 2, tokens - 1, tokens]
        check_index(lkv_ext.select(scores, budgets, **options), expected([], scores, budgets, **options))


@pytest.mark.parametrize("dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [300, 5000])
def test_scores_shared_by_an_axis(device: str, dtype: torch.dtype, tokens: int) -> None:
    """By sequences, by heads and by tokens: what lies behind a score in memory is another one."""
    every, budgets = scores_of("normal", [2, 3, tokens]).to(dtype).to(device), [tokens // 7, tokens // 2, tokens - 1]
    for axis in range(3):
        scores = every.narrow(axis, 0, 1).expand(2, 3, tokens)
        check_index(lkv_ext.select(scores, budgets), expected([], scores, budgets))


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_device_values(device: str, span: dict) -> None:
    """What only the device knows gives the same rows, in an output that is sized without it."""
    payload, scores = cache(device), scores_of("normal", [2, 3, 257]).to(device)
    lengths, starts = torch.tensor([[200, 0, 257], [9, 300, 256]]), torch.tensor([57, 0], dtype=torch.int32)
    budgets = torch.tensor(BUDGETS)
    if not {"capacity", "max_budget"} & span.keys():
        span = span | dict(capacity=640)
    with unreadable():
        out = lkv_ext.evict(
            *payload[:2],
            scores,
            budgets.to(device),
            companions=payload[2:],
            lengths=lengths.to(device),
            starts=starts.to(device),
            **span,
        )
    assert out.overflow is not None
    want = expected(payload, scores, budgets, lengths=lengths, starts=starts, total=out.positions.numel(), **span)
    check(out, want)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_device_lengths_are_bounded_by_host_budgets(device: str, layout: str) -> None:
    payload, scores = cache(device), scores_of("normal", [2, 3, 257]).to(device)
    lengths = torch.tensor([30, 200])
    with unreadable():
        out = lkv_ext.evict(*payload[:2], scores, BUDGETS, lengths=lengths.to(device), layout=layout)
    bounds = torch.tensor(BUDGETS).clamp(0, 257)
    assert out.positions.numel() == (bounds.sum() if layout == "packed" else 6 * bounds.max())
    total = out.positions.numel()
    check(out, expected(payload[:2], scores, BUDGETS, lengths=lengths, layout=layout, total=total))


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("readable", [True, False])
def test_ragged(device: str, span: dict, readable: bool) -> None:
    payload, scores, cu_seqlens = ragged_cache(device)
    shape, budgets = (2, 3), [[40, 3, 200], [17, 5, 0]]
    for lengths in (None, [[4, 0, 250], [17, 20, 0]]):
        arguments = (payload[0], None, scores, budgets)
        options = dict(cu_seqlens=cu_seqlens, lengths=lengths, companions=payload[1:]) | span
        if readable:
            out = lkv_ext.evict(*arguments, **options)
        else:
            with unreadable():
                out = lkv_ext.evict(*arguments, **options)
            assert out.overflow is not None
        options.pop("companions")
        total = None if readable and device == "cpu" else out.positions.numel()
        check(out, expected(payload, scores, budgets, shape=shape, total=total, **options))


@pytest.mark.parametrize(
    "budgets, lengths, shape",
    [
        (30, None, (1, 6)),
        ([30, 3, 200], None, (2, 3)),
        (torch.tensor([30, 3]), None, (3, 2)),
        (30, [9, 20], (2, 3)),
        ([30, 3], [9, 20, 400], (3, 2)),
        (30, [[9], [20], [1], [0], [5], [7]], (6, 1)),
        ([[30] * 3] * 2, [9, 20], (2, 3)),
    ],
)
def test_ragged_shapes(device: str, budgets: object, lengths: object, shape: tuple[int, int]) -> None:
    """B and H of ragged input are those of its integers."""
    payload, scores, cu_seqlens = ragged_cache(device)
    out = lkv_ext.evict(*payload, scores, budgets, cu_seqlens=cu_seqlens, lengths=lengths)
    total = None if device == "cpu" else out.positions.numel()
    want = expected(payload, scores, budgets, cu_seqlens=cu_seqlens, lengths=lengths, shape=shape, total=total)
    assert out.lengths.shape == shape
    check(out, want)


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_select_then_gather(device: str, span: dict) -> None:
    payload, scores = cache(device), scores_of("normal", [2, 3, 257]).to(device)
    index = lkv_ext.select(scores, BUDGETS, **span)
    want = expected(payload, scores, BUDGETS, **span)
    check_index(index, want)
    check_rows(lkv_ext.gather(payload, index), want.tensors)


def test_gather_distrusts_the_index(device: str) -> None:
    """Any integers in an index give rows of their own segment or zeros."""
    payload = cache(device)
    index = lkv_ext.select(scores_of("normal", [2, 3, 257]).to(device), 50)
    index.positions = torch.randint(-300, 600, index.positions.shape, dtype=torch.int32).to(device)
    index.positions[:6] = torch.tensor([2**31 - 1, -(2**31), 257, 256, -1, 0])
    got = lkv_ext.gather(payload, index)
    for mine, source in zip(got, payload, strict=True):
        rows = [head for sequence in bits(source) for head in sequence]
        assert torch.equal(bits(mine), reference.gather(rows, index.positions, index.cu_seqlens.tolist()))


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("tokens", [(257, 257), (257, 40), (40, 257)])
def test_evict_layers(device: str, span: dict, tokens: tuple[int, int]) -> None:
    """Layers of different lengths and strides in one joint buffer; each is the eviction of that layer alone."""
    layers = [cache(device, length) for length in tokens]
    layers[1] = [place(t, "tokens_first") for t in layers[1]]
    scores = [scores_of("ties", [2, 3, length], n).to(device) for n, length in enumerate(tokens)]
    ks, vs, companions = zip(*layers, strict=True)
    for budgets in (30, [[10, 0, 300], [7, 64, 1]], torch.arange(12).view(2, 2, 3) * 9):
        out = lkv_ext.evict_layers(
            ks, vs, scores, budgets, lengths=[250, 33], starts=[[0, 5, 9]] * 2, companions=[companions], **span
        )
        shape = (2, 2, 3)
        want = reference.evict_layers(
            [[bits(t) for t in part] for part in (ks, vs, companions)],
            scores,
            spread(budgets, shape),
            lengths=spread([250, 33], (2, 3), per_sequence=True).expand(shape),
            starts=torch.tensor([[0, 5, 9]] * 2).expand(shape),
            **span,
        )
        check(out, want)
        if "capacity" in span or span.get("layout") == "padded":
            continue
        for n in range(2):
            alone = lkv_ext.evict(
                ks[n],
                vs[n],
                scores[n],
                spread(budgets, shape)[n],
                lengths=[250, 33],
                starts=[[0, 5, 9]] * 2,
                companions=[companions[n]],
                **span,
            )
            mine = out.layer(n)
            begin, end = int(mine.cu_seqlens[0]), int(mine.cu_seqlens[-1])
            assert torch.equal(mine.cu_seqlens - begin, alone.cu_seqlens)
            assert torch.equal(bits(mine.k)[begin:end], bits(alone.k))
            assert torch.equal(mine.positions[begin:end], alone.positions)


@pytest.mark.parametrize("span", [dict(reserve=3), dict(align=4), dict(layout="padded", reserve=2)], ids=str)
def test_a_bound_of_no_rows(device: str, span: dict) -> None:
    """`max_budget` of 0 is a bound like any other, where spans have rows."""
    k, v, _ = cache(device)
    scores = scores_of("normal", [2, 3, 257]).to(device)
    for budgets in (5, BUDGETS):
        want = expected([k, v], scores, budgets, max_budget=0, **span)
        check(lkv_ext.evict(k, v, scores, budgets, max_budget=0, **span), want)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_one_layer_keeps_its_axis(device: str, layout: str) -> None:
    k, v, _ = cache(device)
    scores = scores_of("normal", [2, 3, 257]).to(device)
    joint = lkv_ext.evict_layers([k], [v], [scores], [BUDGETS[0]], layout=layout)
    assert joint.lengths.shape == (1, 2, 3)
    alone, mine = lkv_ext.evict(k, v, scores, BUDGETS[0], layout=layout), joint.layer(0)
    assert torch.equal(bits(mine.k), bits(alone.k)) and torch.equal(mine.positions, alone.positions)
    assert torch.equal(mine.cu_seqlens, alone.cu_seqlens) and torch.equal(mine.lengths, alone.lengths)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("options", [dict(), dict(starts=[57, 0]), dict(lengths=[3, 200]), dict(sink=9, window=30)])
def test_evict_in_place(device: str, placement: str, options: dict) -> None:
    """Kept rows at [0, n), everything else as it was: gaps and neighbours too."""
    payload = [place(t, placement) for t in cache(device)]
    mine, theirs = twins(payload), twins(payload)
    scores = scores_of("ties", [2, 3, 257]).to(device)
    index = lkv_ext.evict_(*mine[:2], scores, BUDGETS, companions=mine[2:], **options)
    check_index(index, expected(theirs, scores, BUDGETS, in_place=True, **options))
    for got, want in zip(mine, theirs, strict=True):
        assert torch.equal(storage_bytes(got), storage_bytes(want))


def test_evict_in_place_ragged(device: str) -> None:
    payload, scores, cu_seqlens = ragged_cache(device)
    mine, theirs = twins(payload), twins(payload)
    budgets = [[40, 3, 200], [17, 5, 0]]
    index = lkv_ext.evict_(*mine, scores, budgets, cu_seqlens=cu_seqlens)
    total = None if device == "cpu" else index.positions.numel()
    want = expected(theirs, scores, budgets, cu_seqlens=cu_seqlens, shape=(2, 3), in_place=True, total=total)
    check_index(index, want)
    for got, want_rows in zip(mine, theirs, strict=True):
        assert torch.equal(storage_bytes(got), storage_bytes(want_rows))


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_out(device: str, span: dict) -> None:
    """A buffer of an earlier call holds the same as a fresh one."""
    payload, scores = cache(device), scores_of("normal", [2, 3, 257]).to(device)
    out = lkv_ext.evict(*payload[:2], scores, BUDGETS, companions=payload[2:], **span)
    for t in (*out.companions, out.k, out.v, out.positions):
        t.view(torch.uint8).fill_(0x5A)
    pointer = out.k.data_ptr()
    again = lkv_ext.evict(*payload[:2], -scores, BUDGETS, companions=payload[2:], out=out, **span)
    assert again is out and again.k.data_ptr() == pointer
    check(again, expected(payload, -scores, BUDGETS, **span))


def test_out_of_other_budgets_and_spans(device: str) -> None:
    """Buffers fit any call of as many rows, and describe what came last."""
    payload, scores = cache(device), scores_of("normal", [2, 3, 257]).to(device)
    calls = (
        dict(budgets=[8, 6, 4]),
        dict(budgets=[1, 1, 16]),
        dict(budgets=[6, 4, 2], reserve=2),
        dict(budgets=[7, 5, 3], align=2),
    )
    for first, then in itertools.permutations(calls, 2):
        out, fresh = (lkv_ext.evict(*payload[:2], scores, companions=payload[2:], **x) for x in (first, then))
        again = lkv_ext.evict(*payload[:2], scores, companions=payload[2:], out=out, **then)
        check(again, expected(payload, scores, **then))
        assert again.max_length == fresh.max_length == max(then["budgets"])
        assert (again.reserve, again.align) == (then.get("reserve", 0), then.get("align", 1))


def test_plan(device: str) -> None:
    """A plan is as its integers, for many calls."""
    payload, scores = cache(device), scores_of("normal", [2, 3, 257]).to(device)
    plan = lkv_ext.plan(BUDGETS, [200, 9], device=device)
    for s in (scores, -scores):
        out = lkv_ext.evict(*payload[:2], s, plan)
        assert out.overflow is None
        check(out, expected(payload[:2], s, BUDGETS, lengths=[200, 9]))
