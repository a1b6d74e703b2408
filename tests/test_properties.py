"""What holds of every eviction, on random calls."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cases import (
    bits,
    check,
    check_index,
    expected,
    payload_of,
    rows_of,
    scores_of,
    spread,
    storage_bytes,
    twins,
    unreadable,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import Call, calls, scores, shuffled

import lkv_ext
from lkv import reference


def run(call: Call, **changes: object) -> lkv_ext.RaggedKV:
    with contextlib.nullcontext() if call.readable else unreadable():
        return lkv_ext.evict(*call.arguments, companions=call.companions, **(call.options | changes))


def same(a: lkv_ext.RaggedKV, b: lkv_ext.RaggedKV) -> None:
    for name in ("positions", "lengths", "cu_seqlens"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for mine, theirs in zip(payload_of(a), payload_of(b), strict=True):
        assert torch.equal(bits(mine), bits(theirs))


def rows_kept(out: lkv_ext.RaggedKV, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The kept rows of each segment, without slack, whatever the layout."""
    flat = bits(tensor).flatten(0, out.positions.dim() - 1)
    begins, lengths = out.cu_seqlens.tolist(), out.lengths.flatten().tolist()
    return [flat[begin : begin + length] for begin, length in zip(begins, lengths, strict=False)]


@given(calls())
def test_evict_is_the_reference(device: str, call: Call) -> None:
    call = call.to(device)
    out = run(call)
    if call.shape[0] * call.shape[1] == 0:
        assert out.lengths.shape == call.shape and out.cu_seqlens.tolist() == [0]
        assert not (out.positions != -1).any() and not any(bits(t).any() for t in payload_of(out))
        return
    total = None if call.sized_exactly else out.positions.numel()
    check(out, expected(call.payload, call.scores, call.budgets, shape=call.shape, total=total, **call.options))


ENDS = st.sampled_from([("front", 1), ("back", 1), ("back", 7), ("back", 16)])


@given(calls(fewest=1, placed_spans=False), ENDS, st.sampled_from(["ascending", "any"]))
def test_in_place_is_the_reference(device: str, call: Call, end: tuple[str, int], order: str) -> None:
    """Kept rows in front, or at the end of the valid range; canaries before, after and between the rows untouched."""
    call.options["to"], call.options["page"] = end
    call.options["order"] = order
    call = call.to(device)
    mine, theirs = twins(call.payload), twins(call.payload)
    k, v = mine[0], mine[1] if call.has_v else None
    companions = mine[2 if call.has_v else 1 :]
    with contextlib.nullcontext() if call.readable else unreadable():
        index = lkv_ext.evict_(k, v, call.scores, call.budgets, companions=companions, **call.options)
    total = None if call.sized_exactly else index.positions.numel()
    want = expected(theirs, call.scores, call.budgets, shape=call.shape, in_place=True, total=total, **call.options)
    check_index(index, want)
    for got, wanted in zip(mine, theirs, strict=True):
        assert torch.equal(storage_bytes(got), storage_bytes(wanted))


@given(calls(fewest=1, ragged=False))
def test_layers_are_the_reference(device: str, call: Call) -> None:
    """Two layers in one launch, the second read backwards, from other strides."""
    call = call.to(device)
    second = [bits(t).flip(2).view(t.dtype) for t in call.payload], call.scores.flip(2)
    shape = (2, *call.shape)
    budgets = spread(call.budgets, call.shape).expand(shape)
    budgets = budgets if call.readable else budgets.to(device)
    payload = [list(layers) for layers in zip(call.payload, second[0], strict=True)]
    with contextlib.nullcontext() if call.readable else unreadable():
        if not call.readable and not {"capacity", "max_budget"} & call.options.keys():
            call.options["capacity"] = 480
        out = lkv_ext.evict_layers(
            payload[0],
            payload[1] if call.has_v else None,
            [call.scores, second[1]],
            budgets,
            companions=payload[2 if call.has_v else 1 :],
            **call.options,
        )
    for name in ("lengths", "starts"):
        values = spread(call.options[name], call.shape, per_sequence=True)
        call.options[name] = None if values is None else values.expand(shape)
    want = reference.evict_layers(
        [[bits(t) for t in layers] for layers in payload],
        [call.scores, second[1]],
        budgets,
        total=None if call.readable else out.positions.numel(),
        **call.options,
    )
    check(out, want)


@given(calls())
def test_host_and_device_values_agree(call: Call) -> None:
    """Integers that only the device knows choose the same rows, in spans of at least that size."""
    call.readable = False
    if not {"capacity", "max_budget"} & call.options.keys():
        call.options["max_budget"] = 400
    bounded = run(call)
    call.readable = True
    exact = run(call)
    if call.options.get("capacity") is None:
        assert bounded.positions.numel() >= exact.positions.numel()
        assert torch.equal(bounded.lengths, exact.lengths)
        for a, b in zip(payload_of(bounded), payload_of(exact), strict=True):
            for mine, theirs in zip(rows_kept(bounded, a), rows_kept(exact, b), strict=True):
                assert torch.equal(mine, theirs)


@given(calls())
def test_a_buffer_is_not_read(call: Call) -> None:
    """What lay in `out` before does not show."""
    fresh = run(call)
    reused = run(call)
    for t in (*payload_of(reused), reused.positions, reused.lengths, reused.cu_seqlens):
        bits(t).fill_(1 if t.dtype is torch.bool else 0x5A)
    assert run(call, out=reused) is reused
    same(reused, fresh)


@given(calls())
def test_layouts_agree(call: Call) -> None:
    """packed = padded, row by row."""
    for option in ("capacity", "max_budget"):
        call.options.pop(option, None)
    call.readable = True
    packed, padded = run(call, layout="packed"), run(call, layout="padded")
    assert torch.equal(packed.lengths, padded.lengths)
    for a, b in zip([*payload_of(packed), packed.positions], [*payload_of(padded), padded.positions], strict=True):
        for mine, theirs in zip(rows_kept(packed, a), rows_kept(padded, b), strict=True):
            assert torch.equal(mine, theirs)


@given(calls(fewest=1, placed_spans=False), st.integers(0, 40), st.integers(0, 40))
def test_shrinking_twice_is_shrinking_once(call: Call, more: int, less: int) -> None:
    """Scores as a companion: the best n of the best m >= n are the best n. Positions compose."""
    call.readable, call.options["window"] = True, 0
    call.budgets, call.options["lengths"] = less + more, torch.full(call.shape, 300)
    payload = [call.payload[0], call.scores, *call.payload[1:]]
    sink = call.options["sink"]

    first = lkv_ext.evict(payload[0], None, call.scores, call.budgets, companions=payload[1:], **call.options)
    call.budgets = less
    once = lkv_ext.evict(payload[0], None, call.scores, less, companions=payload[1:], **call.options)
    twice = lkv_ext.evict(
        first.k,
        None,
        first.companions[0],
        less,
        companions=first.companions[1:],
        cu_seqlens=first.cu_seqlens,
        lengths=first.lengths,
        sink=sink,
    )
    assert torch.equal(once.lengths, twice.lengths) and torch.equal(bits(once.k), bits(twice.k))
    original = [
        rows[keep.long()]
        for rows, keep in zip(rows_kept(first, first.positions), rows_kept(twice, twice.positions), strict=True)
    ]
    assert all(map(torch.equal, original, rows_kept(once, once.positions)))


@given(calls(fewest=1, ragged=False, placed_spans=False), st.integers(0, 1000))
def test_heads_do_not_meet(call: Call, seed: int) -> None:
    """Segments in another order are the same segments: no result depends on a neighbour."""
    call.readable = True
    batch, heads = call.shape
    count = batch * heads
    order = shuffled(count, seed)

    def each(values: object) -> list[int] | None:
        if values is None:
            return None
        t = torch.as_tensor(values)
        t = t[:, None] if t.dim() == 1 and values is not call.budgets else t
        return t.expand(batch, heads).flatten()[order][None].tolist()

    def moved(t: torch.Tensor) -> torch.Tensor:
        return t.flatten(0, 1)[order][None]

    options = call.options | dict(lengths=each(call.options["lengths"]), starts=each(call.options["starts"]))
    out = run(call)
    other = lkv_ext.evict(moved(call.payload[0]), None, moved(call.scores), each(call.budgets), **options)
    mine, theirs = rows_kept(out, out.k), rows_kept(other, other.k)
    assert all(torch.equal(theirs[i], mine[int(row)]) for i, row in enumerate(order))


@given(calls())
def test_inputs_are_only_read(call: Call) -> None:
    tensors = [*call.payload, call.scores, *(t for t in call.options.values() if isinstance(t, torch.Tensor))]
    before = [storage_bytes(t).clone() for t in tensors]
    run(call)
    assert all(torch.equal(storage_bytes(t), old) for t, old in zip(tensors, before, strict=True))


@given(st.data(), st.integers(0, 3), st.integers(1, 600))
def test_selection_is_a_top_k(data: st.DataObject, heads: int, tokens: int) -> None:
    """Without the reference: no row left out ranks above one that is kept."""
    values = data.draw(scores((2, heads, tokens), data.draw(st.integers(0, 99))))
    budget = data.draw(st.integers(0, tokens))
    index = lkv_ext.select(values, budget, layout="padded")
    chosen = torch.zeros(values.shape, dtype=torch.bool).scatter_(2, index.positions.long(), True)
    assert bool((chosen.sum(2) == budget).all())
    if 0 < budget < tokens:
        rank = values.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        worst_kept = rank.masked_fill(~chosen, torch.inf).amin(2)
        best_left = rank.masked_fill(chosen, -torch.inf).amax(2)
        assert bool((worst_kept >= best_left).all())
        kept_nan, left_number = (values.isnan() & chosen).any(2), (~values.isnan() & ~chosen).any(2)
        assert not bool((kept_nan & left_number).any())


@pytest.mark.parametrize("tokens", [100, 40_000])
def test_threads_do_not_show(tokens: int) -> None:
    """Any number of threads, and fewer heads than threads: the same bits."""
    k, v = rows_of([1, 3, tokens, 64], torch.bfloat16, 1), rows_of([1, 3, tokens, 32], torch.bfloat16, 2)
    values = scores_of("ties", [1, 3, tokens])
    threads = torch.get_num_threads()
    results, in_place = [], []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(lkv_ext.evict(k, v, values, [tokens // 2, 3, tokens // 5], reserve=1, align=16))
            copies = twins([k, v])
            lkv_ext.evict_(*copies, values, [tokens // 2, 3, tokens // 5])
            in_place.append(copies)
    finally:
        torch.set_num_threads(threads)
    for other, copies in zip(results[1:], in_place[1:], strict=True):
        same(results[0], other)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(copies, in_place[0], strict=True))
