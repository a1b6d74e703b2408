"""Somebody writes to the tensors of a call while it runs: any result will do, but nothing outside of them is touched.

What is read or written outside shows under AddressSanitizer, see tests/sanitizer. All on the CPU, where a call and
another thread of Python run at the same time.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from invariants import unwatched
from torch import Tensor

import lkv_ext
import lkv_ext.numpy as lkv_numpy
from lkv_ext._torch.library import ops

CALLS = 12  # of each op; with a handful of them every fault that these tests were written for has shown
ROWS, TOKENS, DIM = 24, 1500, 4
TOTAL = ROWS * TOKENS
EVEN = torch.arange(ROWS + 1, dtype=torch.int32) * TOKENS
FIRST_HAS_ALL = torch.full((ROWS + 1,), TOTAL, dtype=torch.int32).index_fill_(0, torch.tensor([0]), 0)
LAST_HAS_ALL = torch.zeros(ROWS + 1, dtype=torch.int32).index_fill_(0, torch.tensor([ROWS]), TOTAL)
OFFSETS = (EVEN, FIRST_HAS_ALL, LAST_HAS_ALL, EVEN.flip(0), EVEN - 7 * TOKENS, EVEN * 1000)


@contextlib.contextmanager
def rewritten(tensor: Tensor, *states: Tensor) -> Iterator[None]:
    """Another thread puts one state after the other into the tensor."""
    into, sources, stop = tensor.numpy(), [s.numpy() for s in states], threading.Event()

    def write() -> None:
        while not stop.is_set():
            for source in sources:
                np.copyto(into, source)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def check(positions: Tensor) -> None:
    assert bool(((positions >= -1) & (positions < TOTAL)).all())


def rows(dim: int = DIM) -> Tensor:
    return torch.zeros(TOTAL, dim)


KEPT = [[TOKENS // 2] * ROWS]
RAGGED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "select": lambda scores, cu: lkv_ext.select(scores, KEPT, cu_seqlens=cu, window=3),
    "evict": lambda scores, cu: lkv_ext.evict(rows(), rows(), scores, KEPT, cu_seqlens=cu, sink=2, max_budget=1000),
    "evict_": lambda scores, cu: lkv_ext.evict_(rows(), rows(), scores, KEPT, cu_seqlens=cu),
    "numpy.select": lambda scores, cu: lkv_numpy.select(scores.numpy(), KEPT, cu_seqlens=cu.numpy(), threads=2),
    "numpy.evict": lambda scores, cu: lkv_numpy.evict(
        rows().numpy(), rows().numpy(), scores.numpy(), KEPT, cu_seqlens=cu.numpy(), threads=2
    ),
    "numpy.evict_": lambda scores, cu: lkv_numpy.evict_(
        rows().numpy(), rows().numpy(), scores.numpy(), KEPT, cu_seqlens=cu.numpy(), threads=2
    ),
}


@pytest.mark.parametrize("op", RAGGED)
def test_cu_seqlens(op: str) -> None:
    """All scores tie: a row needs as much scratch as it has tokens."""
    scores, cu = torch.zeros(TOTAL), EVEN.clone()
    with rewritten(cu, *OFFSETS):
        for _ in range(CALLS):
            check(torch.as_tensor(RAGGED[op](scores, cu).positions))


@pytest.mark.parametrize("tokens", [900, 3000, 9000])  # searched, by a histogram, by a sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores(tokens: int, dtype: torch.dtype) -> None:
    low, mixed = torch.full((1, 2, tokens), -1, dtype=dtype), torch.linspace(-9, 9, tokens, dtype=dtype)
    scores = low.clone()
    with rewritten(scores, low, -low, mixed.expand_as(low), mixed.flip(0).expand_as(low), low * float("nan")):
        for _ in range(CALLS):
            check(lkv_ext.select(scores, 37).positions)
            check(lkv_ext.select(scores, tokens - 20).positions)
            lkv_ext.soft_topk(scores, 37.0, 0.5)


def test_integers_that_only_the_kernel_reads() -> None:
    scores, k = torch.zeros(1, 4, TOKENS), torch.zeros(1, 4, TOKENS, DIM)
    values = torch.tensor([[0, 7, TOKENS, 3]])
    with rewritten(values, values * 2**40, -values, values.flip(1), torch.full_like(values, TOKENS)):
        for _ in range(CALLS):
            sizes = [], 2000, -1, True, None, 0, 0, values, None, values, None, values
            *_, positions, _, _, _ = ops.evict([k, k.half()], [scores], *sizes)
            check(positions)
            check(ops.evict_([k, k.half()], [scores], *sizes)[0])
            lkv_ext.soft_topk(scores, 3.0, 1.0, lengths=values)


@pytest.mark.parametrize("name", ["positions", "lengths", "cu_seqlens"])
def test_out(name: str) -> None:
    k, scores = rows().view(1, ROWS, TOKENS, DIM), torch.zeros(1, ROWS, TOKENS)
    out = lkv_ext.evict(k, k, scores, 700)
    part = getattr(out, name)
    with rewritten(part, part.clone(), torch.zeros_like(part), part + 2**30, -part, part.flip(0)):
        for _ in range(CALLS):
            lkv_ext.evict(k, k, scores, 700, out=out)


@pytest.mark.parametrize("name", ["positions", "cu_seqlens"])
@pytest.mark.parametrize("front_end", ["torch", "numpy"])
def test_gather(front_end: str, name: str) -> None:
    index = lkv_ext.select(torch.zeros(1, ROWS, TOKENS), 700)
    k, part = rows().view(1, ROWS, TOKENS, DIM), getattr(index, name)
    parts = index.positions.numpy(), index.lengths.numpy(), index.cu_seqlens.numpy()
    numpys = lkv_numpy.RaggedIndex(*parts, index.max_length)
    with rewritten(part, part.clone(), torch.zeros_like(part), part + 2**30, -part, part.flip(0)):
        for _ in range(CALLS):
            moved = lkv_ext.gather([k], index) if front_end == "torch" else lkv_numpy.gather([k.numpy()], numpys)
            assert not moved[0].any()


def test_tables_that_attention_reads() -> None:
    """Pages that lie side by side when they are looked at, and then no longer: nothing behind the pool is read."""
    page, heads, most = 8, 4, 40
    pool, q = torch.zeros(heads * most, page, DIM), torch.zeros(1, heads, 2, DIM)
    held, length = torch.full((1, heads), page * most, dtype=torch.int32), page * most
    even = torch.arange(heads * most, dtype=torch.int32).view(1, heads, most)
    for name, states in (
        ("tables", (even, torch.full_like(even, heads * most - 1), even + 2**30, -even, even.flip(2))),
        ("lengths", (held, -held, held * 2**10, held // 7)),
    ):
        part = states[0].clone()
        given = {"tables": even, "lengths": held, name: part}
        with rewritten(part, *states):
            for _ in range(20 * CALLS):
                assert not ops.attend_paged(q, pool, pool, given["tables"], given["lengths"], length, True, 1.0).any()


@pytest.mark.parametrize("name", ["lengths", "cu_seqlens"])
def test_cache(name: str) -> None:
    cache = lkv_ext.RaggedCache.empty(1, ROWS, DIM, reserve=TOKENS)
    more, q = torch.zeros(1, ROWS, 3, DIM), torch.zeros(1, ROWS, 2, DIM)
    cache.append(torch.zeros(1, ROWS, 700, DIM), torch.zeros(1, ROWS, 700, DIM))
    part = getattr(cache, name)
    states = [*OFFSETS, EVEN] if name == "cu_seqlens" else [part + 2**30, -part, part * 2]
    with rewritten(part, *states), unwatched():
        for _ in range(CALLS):
            cache.append(more, more)
            assert not cache.attend(q).any()
