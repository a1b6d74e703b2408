"""evict beside memcpy, the naive pipeline and the best PyTorch composition; evict_; small evictions in one launch."""

from __future__ import annotations

from collections.abc import Callable

import contenders
import pytest
import rivals
import torch
from conftest import Bench
from contenders import same_bytes
from shapes import LENGTHS, Inputs, Shape, make_inputs
from timing import Call, switched

import lkv_ext

MODES = ("fresh", "warm", "graph")


def evict(inputs: Inputs, out: lkv_ext.RaggedKV | None = None) -> Call:
    budgets = inputs.budgets
    return lambda: lkv_ext.evict(inputs.k, inputs.v, inputs.scores, budgets, out=out)


def evict_warm(inputs: Inputs) -> Call:
    return evict(inputs, evict(inputs)())


def race(bench: Bench, mode: str, shape: Shape, others: Callable[[Inputs], dict[str, Call]] | None = None) -> None:
    """evict against memcpy, the PyTorch pipelines or `others`, and on CUDA all others that are there."""
    inputs = make_inputs(shape, bench.device)
    out = lkv_ext.evict(inputs.k, inputs.v, inputs.scores, shape.budgets)
    pair = [out.k, out.v]
    found = {"best": rivals.best(inputs)} if others is None else others(inputs)
    if others is None and bench.device == "cpu":
        found["best by mask"] = rivals.best_by_mask(inputs)
    if contenders.settled(shape):
        for name, call in found.items():
            assert name == "uniform" or same_bytes(call(), pair), f"{name} moves other rows than evict"
    if others is None and shape.dtype != torch.float8_e4m3fn:
        found["naive"] = rivals.naive(inputs)
    found |= bench.admit(lambda: contenders.for_evict(inputs, pair))
    subject, memcpy = evict(inputs), rivals.clone(pair)
    if mode == "warm":
        subject, memcpy = evict(inputs, out), rivals.copy_warm(pair)
        if others is None and bench.device == "cpu":
            found = {"best out=": rivals.best_out(inputs)}
    bench.time("evict", mode, shape, subject, {"memcpy": memcpy, **found}, shape.moved_bytes)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mode", MODES)
def test_length(bench: Bench, length: int, mode: str) -> None:
    race(bench, mode, Shape(length))


@pytest.mark.parametrize("length", LENGTHS[:2])
def test_cold_caches(bench: Bench, length: int) -> None:
    """Short contexts fit in the caches of a CPU; a real cache may just have left them."""
    if bench.device != "cpu":
        pytest.skip("the sweep over L has cold caches there")
    race(bench, "cold", Shape(length))


@pytest.mark.parametrize("batch, heads, length", [(1, 2, 32768), (1, 32, 8192), (4, 8, 8192)])
def test_heads_and_batch(bench: Bench, batch: int, heads: int, length: int) -> None:
    race(bench, bench.sweep, Shape(length, heads=heads, batch=batch))


@pytest.mark.parametrize("retention", [0.05, 0.3, 0.5])
def test_retention(bench: Bench, retention: float) -> None:
    race(bench, bench.sweep, Shape(32768, retention=retention))


@pytest.mark.parametrize(
    "dtype, score_dtype, dim",
    [
        (torch.float32, torch.float32, 128),
        (torch.float8_e4m3fn, torch.float32, 128),
        (torch.bfloat16, torch.bfloat16, 128),
        (torch.bfloat16, torch.float32, 64),
    ],
    ids=str,
)
def test_dtype(bench: Bench, dtype: torch.dtype, score_dtype: torch.dtype, dim: int) -> None:
    race(bench, bench.sweep, Shape(32768, dtype=dtype, score_dtype=score_dtype, dim=dim))


@pytest.mark.parametrize("length", [8192, 131072])
@pytest.mark.parametrize("mode", MODES)
def test_skewed_budgets(bench: Bench, length: int, mode: str) -> None:
    """One head with 40 % of the budget, against uniform budgets of the same total and the per-head loop."""
    uniform = make_inputs(Shape(length), bench.device)

    def others(inputs: Inputs) -> dict[str, Call]:
        if mode == "warm" and bench.device == "cpu":
            return {"uniform": evict_warm(uniform)}
        return {"loop": rivals.loop(inputs), "best": rivals.best_ragged(inputs), "uniform": evict(uniform)}

    race(bench, mode, Shape(length, skewed=True), others)


def test_tiny(bench: Bench) -> None:
    """Nothing but the overhead of the call, which counts when decoding."""
    race(bench, "fresh", Shape(16, heads=2, dim=8, retention=0.5))


@pytest.mark.parametrize("length", [8192, 131072])
def test_in_place(bench: Bench, length: int) -> None:
    """evict_ beside evict and a composition that copies the kept rows back.

    Every round evicts what the last one left: the same positions, so the same work.
    """
    shape = Shape(length)
    whole = make_inputs(shape, bench.device)
    inputs = Inputs(shape, whole.k.clone(), whole.v.clone(), whole.scores)
    budgets = inputs.budgets
    out = lkv_ext.evict(whole.k, whole.v, whole.scores, budgets)
    others = {
        "memcpy": rivals.copy_warm([out.k, out.v]),
        "evict": evict(whole),
        "best, copied back": rivals.best_in_place(inputs),
        **bench.admit(lambda: contenders.for_evict_in_place(inputs)),
    }

    def subject() -> lkv_ext.RaggedIndex:
        return lkv_ext.evict_(inputs.k, inputs.v, inputs.scores, budgets)

    bench.time("evict_", "warm", shape, subject, others, shape.moved_bytes)


@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "skewed"])
@pytest.mark.parametrize("length", [256, 512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("mode", ["graph"])
def test_one_launch(bench: Bench, mode: str, length: int, skewed: bool) -> None:
    """Small evictions in one launch, and as a select with a gather beside it: which is faster from where on."""
    inputs = make_inputs(Shape(length, skewed=skewed), bench.device)
    ways = {name: switched(evict(inputs), "LKV_CUDA_EVICT", name) for name in ("fused", "pair")}
    bench.time("evict, by size", mode, inputs.shape, evict(inputs), ways, inputs.shape.moved_bytes)
