"""Calls of several threads each, also from several Python threads at once, with different data, on one library."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import bits, check, check_index, expected, payload_of, rows_of, scores_of, storage_bytes, twins

import lkv_ext


@pytest.fixture(autouse=True)
def threads_of_a_call() -> Iterator[None]:
    """Several, also where the environment says one and on a machine with few cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def job(device: str, seed: int) -> tuple[list[torch.Tensor], torch.Tensor, list[int], dict]:
    tokens = 300 + 977 * (seed % 5)
    payload = [rows_of([2, 3, tokens, 16 + seed], torch.bfloat16, seed + i).to(device) for i in range(2)]
    scores = scores_of(("ties", "normal")[seed % 2], [2, 3, tokens], seed).to(device)
    return payload, scores, [tokens // 3, seed, tokens], dict(sink=seed, reserve=seed % 3)


@pytest.mark.parametrize("workers", [2, 5])
def test_evict(device: str, workers: int) -> None:
    jobs = [job(device, seed) for seed in range(10)]
    wanted = [expected(payload, scores, budgets, **options) for payload, scores, budgets, options in jobs]

    def run(seed: int) -> lkv_ext.RaggedKV:
        payload, scores, budgets, options = jobs[seed]
        out = lkv_ext.evict(*payload, scores, budgets, **options)
        for _ in range(4):
            again = lkv_ext.evict(*payload, scores, budgets, **options)
            for mine, theirs in zip(payload_of(again), payload_of(out), strict=True):
                assert torch.equal(bits(mine), bits(theirs))
        return out

    with ThreadPoolExecutor(workers) as pool:
        for out, want in zip(pool.map(run, range(10)), wanted, strict=True):
            check(out, want)


def test_rows_wait_for_their_positions(device: str) -> None:
    """One segment takes much longer to select than the others: no thread may move its rows before that is done."""
    payload = [rows_of([1, 4, 100_000, 16], torch.bfloat16, i).to(device) for i in range(2)]
    scores = scores_of("normal", [1, 4, 100_000], 3).to(device)
    budgets, lengths = [50_000, 5, 5, 5], [[100_000, 10, 10, 10]]
    want = expected(payload, scores, budgets, lengths=lengths)
    for _ in range(5):
        check(lkv_ext.evict(*payload, scores, budgets, lengths=lengths), want)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_columns_of_rows_that_move_in_place(threads: int, heads: int) -> None:
    """Threads share the rows of a head by their columns, which no number of threads may divide evenly."""
    scores, budgets = scores_of("normal", [1, heads, 800]), [500, 300][:heads]
    torch.set_num_threads(threads)
    for sizes in ((384, 384), (320, 64), (700, 41), (8, 1)):
        payload = [rows_of([1, heads, 800, size], torch.uint8, size + i) for i, size in enumerate(sizes)]
        mine, theirs = twins(payload), twins(payload)
        check_index(lkv_ext.evict_(*mine, scores, budgets), expected(theirs, scores, budgets, in_place=True))
        assert all(torch.equal(storage_bytes(a), storage_bytes(b)) for a, b in zip(mine, theirs, strict=True))


def test_every_op_at_once(device: str) -> None:
    """Different ops beside each other: nothing is shared between calls."""
    payload, scores, budgets, options = job(device, 4)
    want = expected(payload, scores, budgets, **options)

    def fused(_: int) -> list[torch.Tensor]:
        return payload_of(lkv_ext.evict(*payload, scores, budgets, **options))

    def in_two(_: int) -> list[torch.Tensor]:
        return lkv_ext.gather(payload, lkv_ext.select(scores, budgets, **options))

    def in_place(_: int) -> list[torch.Tensor]:
        copies = [t.clone() for t in payload]
        lengths = lkv_ext.evict_(*copies, scores, budgets, sink=options["sink"]).lengths
        moved = lkv_ext.evict(*copies, scores, lengths.cpu(), lengths=lengths.cpu(), reserve=options["reserve"])
        return payload_of(moved)

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(op, i) for i in range(5) for op in (fused, in_two, in_place)]
        for future in futures:
            for mine, theirs in zip(future.result(), want.tensors, strict=True):
                assert torch.equal(bits(mine), theirs)
