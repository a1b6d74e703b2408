"""The NumPy front end: exact parity with the reference, threads, forks, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from itertools import product

import numpy as np
import pytest
import torch

import lkv_ext
import lkv_ext.numpy as lkv_np
from lkv import reference
from lkv_ext._numpy import thread_count

rng = np.random.default_rng


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16."""
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def as_scores(values: np.ndarray, kind: str) -> np.ndarray:
    return bf16(values) if kind == "bfloat16" else values.astype(kind)


def to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def ranking(scores: np.ndarray) -> torch.Tensor:
    tensor = to_torch(scores)
    return tensor.view(torch.bfloat16) if scores.dtype == np.uint16 else tensor


def check(result, payload: list[np.ndarray], scores: np.ndarray, budgets, batch: int, heads: int, **options) -> None:
    """`result` is what the reference makes of the same call, to the byte."""
    integers = {
        name: torch.as_tensor(np.broadcast_to(value if np.ndim(value) != 1 or name == "budgets" else
                                              np.asarray(value)[:, None], (batch, heads)).copy())
        for name, value in {"budgets": budgets, **options}.items()
        if name in ("budgets", "lengths", "starts") and value is not None
    }  # fmt: skip
    rest = {k: v for k, v in options.items() if k not in ("lengths", "starts", "threads", "cu_seqlens", "companions")}
    if options.get("cu_seqlens") is not None:
        rest["cu_seqlens"] = to_torch(options["cu_seqlens"])
    expected = reference.evict([to_torch(p) for p in payload], ranking(scores), **integers, **rest)
    moved = [result.k, *([] if result.v is None else [result.v]), *result.companions]
    for got, want in zip(moved, expected.tensors, strict=True):
        assert got.dtype == want.numpy().dtype and got.shape == tuple(want.shape)
        assert got.tobytes() == want.contiguous().numpy().tobytes()
    for name in ("positions", "lengths", "cu_seqlens"):
        got = getattr(result, name)
        assert got.dtype == np.int32 and np.array_equal(got, getattr(expected, name).numpy()), name
    assert result.max_length >= result.lengths.max(initial=0)
    assert result.overflow is None


def cache(batch=2, heads=3, tokens=300, width=16, dtype=np.float32, seed=0):
    r = rng(seed)
    k = (r.standard_normal((batch, heads, tokens, width)) * 50).astype(dtype)
    v = (r.standard_normal((batch, heads, tokens, width + 3)) * 50).astype(dtype)
    return k, v, r.standard_normal((batch, heads, tokens)).astype(np.float32)


HOSTILE = {
    "eight values": lambda r, shape: r.integers(0, 8, shape),
    "constant": lambda r, shape: np.zeros(shape),
    "all -inf": lambda r, shape: np.full(shape, -np.inf),
    "all NaN": lambda r, shape: np.full(shape, np.nan),
    "specials": lambda r, shape: r.choice([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0], shape),
    "shares": lambda r, shape: r.random(shape) / shape[-1],
    "ascending": lambda r, shape: np.broadcast_to(np.arange(shape[-1]), shape),
}


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_scores(name: str, kind: str) -> None:
    k, v, _ = cache()
    scores = as_scores(np.ascontiguousarray(HOSTILE[name](rng(1), (2, 3, 300)), dtype=np.float32), kind)
    budgets = [[0, 7, 150], [300, 299, 1000]]
    for sink, window in ((0, 0), (4, 9)):
        result = lkv_np.evict(k, v, scores, budgets, sink=sink, window=window)
        check(result, [k, v], scores, budgets, 2, 3, sink=sink, window=window)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float16, np.float32, np.float64, np.complex64, bool])
def test_any_dtype_moves(dtype: type) -> None:
    k, v, scores = cache(dtype=dtype)
    check(lkv_np.evict(k, v, scores, [5, 40, 0]), [k, v], scores, [5, 40, 0], 2, 3)


def test_structured_dtypes_move() -> None:
    row = np.dtype([("code", "u1"), ("scale", ">f4"), ("name", "S3")])
    k, _, scores = cache()
    moved = np.zeros((2, 3, 300, 2), row)
    moved["code"] = rng(2).integers(0, 256, moved.shape)
    moved["scale"] = rng(3).standard_normal(moved.shape)
    out = lkv_np.evict(k, None, scores, 9, companions=[moved])
    assert out.v is None and out.companions[0].dtype == row
    for segment, (b, h) in enumerate(product(range(2), range(3))):
        begin, end = out.cu_seqlens[segment : segment + 2]
        assert (out.companions[0][begin:end] == moved[b, h, out.positions[begin:end]]).all()


LAYOUTS = [
    dict(),
    dict(reserve=3),
    dict(align=16),
    dict(reserve=5, align=8, max_budget=33),
    dict(layout="padded"),
    dict(layout="padded", reserve=2, align=4),
    dict(layout="padded", capacity=20),
    dict(capacity=90),
    dict(capacity=0),
    dict(capacity=64, align=16, reserve=1),
]
VALID = [dict(), dict(lengths=[120, 3]), dict(lengths=[[1, 0, 300], [50, 60, 70]], starts=[7, 250])]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("valid", VALID)
def test_layouts(layout: dict, valid: dict) -> None:
    k, v, scores = cache(seed=4)
    extra = rng(5).integers(0, 100, (2, 3, 300), dtype=np.int32)
    budgets = np.array([[40, -3, 11], [0, 80, 500]])
    result = lkv_np.evict(k, v, scores, budgets, sink=2, window=3, companions=[extra], **layout, **valid)
    check(result, [k, v, extra], scores, budgets, 2, 3, sink=2, window=3, **layout, **valid)
    index = lkv_np.select(scores, budgets, sink=2, window=3, **layout, **valid)
    assert np.array_equal(index.positions, result.positions)
    for got, want in zip(lkv_np.gather([k, v, extra], index), [result.k, result.v, *result.companions], strict=True):
        assert np.array_equal(got, want)


def test_strided_views_are_read_in_place() -> None:
    r = rng(6)
    storage = r.standard_normal((2, 300, 3, 40)).astype(np.float32)
    k, v = storage[..., :24].transpose(0, 2, 1, 3), storage[..., 24:].transpose(0, 2, 1, 3)[:, :, ::-1]
    scores = r.standard_normal((300, 3, 4)).astype(np.float32).T[::2, :, ::-1]
    check(lkv_np.evict(k, v, scores, [9, 100, 31]), [k, v], scores, [9, 100, 31], 2, 3)


def test_ragged_goes_in_again() -> None:
    k, v, scores = cache(seed=7)
    first = lkv_np.evict(k, v, scores, [90, 200, 4], reserve=2, align=8, companions=[scores])
    again = dict(cu_seqlens=first.cu_seqlens, lengths=first.lengths)
    result = lkv_np.evict(first.k, first.v, first.companions[0], [30, 3, 10], window=1, **again)
    check(result, [first.k, first.v], first.companions[0], [30, 3, 10], 2, 3, window=1, **again)
    index = lkv_np.select(first.companions[0], [30, 3, 10], window=1, **again)
    assert np.array_equal(lkv_np.gather([first.k], index, cu_seqlens=first.cu_seqlens)[0], result.k)
    assert first.block_table.shape[0] == 6 and first.k.shape[0] % 8 == 0
    pages = first.k.reshape(-1, 8, k.shape[-1])[first.block_table[1]].reshape(-1, k.shape[-1])
    begin, kept = first.cu_seqlens[1], first.lengths[0, 1]
    assert np.array_equal(pages[:kept], first.k[begin : begin + kept])


def test_pages_behind_a_span_are_pages() -> None:
    """Spans of 12, 4 and 0 rows, in pages of 4: behind the last page of a span its block table repeats one."""
    k, _, scores = cache(1, 3, 20, 4, seed=7)
    out = lkv_np.evict(k, None, scores, [9, 1, 0], align=4)
    assert out.block_table.tolist() == [[0, 1, 2], [3, 3, 3], [3, 3, 3]] and out.block_table.dtype == np.int32
    out = lkv_np.evict(k, None, scores, [9, 1, 0], align=4, reserve=4)
    assert out.block_table.tolist() == [[0, 1, 2, 3], [4, 5, 6, 6], [6, 6, 6, 6]]
    assert lkv_np.evict(k, None, scores, [9, 1, 0]).block_table is None
    assert lkv_np.evict(k, None, scores, 0, align=2).block_table.tolist() == [[], [], []]


def test_broken_offsets_stay_inside() -> None:
    k = rng(8).standard_normal((50, 4)).astype(np.float32)
    for offsets in ([0, 90, 20, 50], [-5, 10, 10, 2**31 - 1], [50, 40, 30, 20]):
        cu_seqlens = np.array(offsets, np.int32)
        out = lkv_np.evict(k, None, k[:, 0], 7, cu_seqlens=cu_seqlens)
        assert out.k.shape[0] == out.lengths.sum() and (out.positions >= 0).all()


@pytest.mark.parametrize("to", ["front", "back"])
def test_in_place_leaves_the_rest(to: str) -> None:
    r = rng(9)
    storage = r.integers(0, 256, (2, 3, 300, 40), dtype=np.uint8)
    before, scores = storage.copy(), r.standard_normal((2, 3, 300)).astype(np.float32)
    k, v = storage[..., :16], storage[..., 20:39]
    options = dict(starts=[5, 0], lengths=[250, 300], sink=1, window=2)
    page = dict(to=to, page=16) if to == "back" else {}
    index = lkv_np.evict_(k, v, scores, [200, 0, 17], **options, **page)
    dropped = [[48, 240, 224], [96, 288, 272]]  # in whole pages
    budgets = [[200, 0, 17]] * 2 if to == "front" else np.array([[250], [300]]) - dropped
    expected = lkv_np.evict(before[..., :16], before[..., 20:39], scores, budgets, **options)
    assert np.array_equal(index.positions, expected.positions)
    for segment, (b, h) in enumerate(product(range(2), range(3))):
        begin, end = expected.cu_seqlens[segment : segment + 2]
        last = [255, 300][b] if to == "back" else end - begin
        before[b, h, last - (end - begin) : last, :16] = expected.k[begin:end]
        before[b, h, last - (end - begin) : last, 20:39] = expected.v[begin:end]
    assert np.array_equal(storage, before)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize("to", ["front", "back"])
def test_paged_is_torchs(to: str, order: str, per_head: bool) -> None:
    """Pools, positions and free pages, of companions in pages of their own, too."""
    r = rng(11)
    pools = [r.integers(0, 256, (20, *([] if per_head else [2]), 8, 5), dtype=np.uint8) for _ in range(2)]
    companions = [r.random((9, 2, 16), dtype=np.float32), r.random((40, 4), dtype=np.float32)]
    scores = r.random((2, 2, 40), dtype=np.float32)
    tables = r.permutation(20)[: 20 if per_head else 10].reshape((2, 2, 5) if per_head else (2, 5)).astype(np.int32)
    own = [r.permutation(9)[:6].reshape(2, 3), r.permutation(40).reshape(2, 2, 10)]
    call = dict(scores=scores, budgets=[[9, 3], [30, 0]], tables=tables, lengths=[40, 23], sink=1)
    theirs = [torch.from_numpy(x.copy()) for x in (*pools, *companions)]
    beside = dict(companions=companions, companion_tables=own, to=to, order=order, check=True)
    index = lkv_np.evict_paged_(pools, **call, **beside)
    call |= dict(scores=torch.from_numpy(scores), tables=torch.from_numpy(tables))
    beside |= dict(companions=theirs[2:], companion_tables=[torch.from_numpy(x) for x in own])
    want = lkv_ext.evict_paged_(theirs[:2], **call, **beside)
    for got, expected in zip((*pools, *companions), theirs, strict=True):
        assert got.tobytes() == expected.numpy().tobytes()
    for name in ("positions", "lengths", "cu_seqlens", "free_pages", "retained_bytes", "reclaimable_bytes"):
        assert np.array_equal(getattr(index, name), getattr(want, name).numpy()), name
    for got, expected in zip(index.companion_free_pages, want.companion_free_pages, strict=True):
        assert np.array_equal(got, expected.numpy())


def test_wrong_pages_are_refused() -> None:
    pool, scores, tables = np.zeros((4, 1, 4, 3)), np.zeros((1, 1, 8), np.float32), np.array([[0, 1]])
    for changes, message in (
        (dict(tables=np.array([[1, 1]]), check=True), "tables that use every page once, got page 1"),
        (dict(tables=np.array([[1, 4]]), check=True), r"tables of page ids in \[0, 4\), got 4"),
        (dict(lengths=9), "lengths of at most L = 8 as scores have, got 9"),
        (dict(pools=[]), "at least one pool in pools"),
        (dict(pools=[np.zeros((4, 1, 3, 3))]), r"pages of a power of two of rows, got pools\[0\]"),
        (dict(companions=[pool.copy()]), "one of companion_tables for each of companions"),
        (dict(order="best"), "order 'ascending' or 'any'"),
    ):
        with pytest.raises(ValueError, match=f"^lkv_ext.numpy.evict_paged_: expected {message}"):
            lkv_np.evict_paged_(**dict(pools=[pool], scores=scores, budgets=2, tables=tables) | changes)


def test_out_is_written_again() -> None:
    k, v, scores = cache(seed=10)
    out = lkv_np.evict(k, v, scores, [9, 8, 7], align=4)
    k2, v2, scores2 = cache(seed=11)
    pointers = [a.ctypes.data for a in (out.k, out.v, out.positions)]
    again = lkv_np.evict(k2, v2, scores2, [7, 9, 8], align=4, out=out)
    assert again is out and pointers == [a.ctypes.data for a in (out.k, out.v, out.positions)]
    check(out, [k2, v2], scores2, [7, 9, 8], 2, 3, align=4)


@pytest.mark.parametrize("shape", [(0, 3, 10, 4), (2, 0, 10, 4), (2, 3, 0, 4), (2, 3, 10, 0), (0, 0, 0, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    k, scores = np.zeros(shape, np.float16), np.zeros(shape[:3], np.float32)
    for layout in ("packed", "padded"):
        out = lkv_np.evict(k, k, scores, 4, layout=layout)
        rows = shape[0] * shape[1] * min(4, shape[2])
        assert out.k.size == rows * shape[3] and out.lengths.shape == shape[:2] and out.positions.size == rows
    lkv_np.evict_(k, k.copy(), scores, 4)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_threads_do_not_matter(kind: str) -> None:
    k, v, scores = cache(1, 4, 40000, 64, np.float16, seed=12)
    scores, budgets = as_scores(scores, kind), [20000, 100, 3000, 9000]
    results = [lkv_np.evict(k, v, scores, budgets, threads=n) for n in (1, 2, 8)]
    check(results[0], [k, v], scores, budgets, 1, 4)
    for result in results[1:]:
        assert all(np.array_equal(getattr(result, f), getattr(results[0], f)) for f in ("k", "v", "positions"))
    rows = [a.copy() for a in (k, v)]
    lkv_np.evict_(*rows, scores, budgets, threads=8)
    assert np.array_equal(rows[0][0, 3, :9000], results[0].k[results[0].cu_seqlens[3] :])


def test_threads_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, scores = cache()
    monkeypatch.setenv("LKV_NUM_THREADS", "2")
    check(lkv_np.evict(k, v, scores, 9), [k, v], scores, 9, 2, 3)
    for value in ("0", "-1", "many", ""):
        monkeypatch.setenv("LKV_NUM_THREADS", value)
        with pytest.raises(ValueError, match="lkv_ext.numpy.evict: expected LKV_NUM_THREADS of at least 1"):
            lkv_np.evict(k, v, scores, 9)


def test_as_many_threads_as_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LKV_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(5 + process)), raising=False)
    assert thread_count(None) == 5 and thread_count(7) == 7
    monkeypatch.delattr(os, "sched_getaffinity")
    for found, count in ((3, 3), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda found=found: found)
        assert thread_count(None) == count
    monkeypatch.setenv("LKV_NUM_THREADS", "1")
    assert thread_count(None) == 1 and thread_count(1) == 1
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"threads of at least 1, got {wrong}"):
            thread_count(wrong)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_works_on() -> None:
    code = """
        import os, numpy as np, lkv_ext.numpy as lkv_np
        k = np.random.default_rng(0).standard_normal((1, 4, 20000, 64)).astype(np.float32)
        first = lkv_np.evict(k, k, k[..., 0], 5000, threads=4)
        child = os.fork()
        if child == 0:
            again = lkv_np.evict(k, k, k[..., 0], 5000, threads=4)
            os._exit(0 if np.array_equal(first.k, again.k) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    run_python(code)


def test_works_without_torch() -> None:
    code = """
        import sys
        sys.modules["torch"] = None
        import numpy as np, lkv_ext, lkv_ext.numpy as lkv_np
        k = np.arange(2 * 2 * 9 * 4, dtype=np.float32).reshape(2, 2, 9, 4)
        out = lkv_np.evict(k, k, k[..., 0].copy(), [3, 1])
        assert out.positions.tolist() == [6, 7, 8, 8] * 2, out
        lkv_np.evict_(k, k + 1, k[..., 0].copy(), 2)
        assert lkv_ext.build_info()["cpu_isa"]
    """
    run_python(code)


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
