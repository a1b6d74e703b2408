"""evict beside memcpy, the naive pipeline and the best PyTorch composition; evict_."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import rivals
import rivals_torch as pytorch
import torch
from conftest import MODES, Bench, each
from inputs import Inputs, make_inputs
from shapes import LENGTHS, Shape

import lkv_ext


def race(bench: Bench, mode: str, shape: Shape) -> None:
    """evict beside memcpy, the pipelines of PyTorch, uniform budgets, and on CUDA all others that are there."""
    inputs = make_inputs(shape, bench.device)
    out = inputs.evict()
    rows, warm, cpu = [out.k, out.v], mode == "warm", bench.device == "cpu"
    if warm and cpu:  # on CUDA every graph has memory of its own
        makers = {} if shape.skewed else {"best out=": pytorch.best_out}
    elif shape.skewed:
        makers = {"loop": pytorch.loop, "best": pytorch.best_ragged}
    else:
        makers = {"best": pytorch.best, "best by mask": pytorch.best_by_mask, "naive": pytorch.naive}
        if not cpu:
            del makers["best by mask"]  # one of all others there
        if shape.dtype == torch.float8_e4m3fn:
            del makers["naive"]  # torch gathers no such rows
    others, keeps = {name: make(inputs) for name, make in makers.items()}, rivals.keeps(shape, rows)
    for name, call in others.items():
        assert keeps(call()), f"{name} moves other rows than evict"
    if shape.skewed:
        uniform = make_inputs(replace(shape, skewed=False), bench.device)
        others["uniform"] = uniform.evict_warm() if warm and cpu else uniform.evict
    others |= bench.admit(lambda: rivals.of_evict(shape), inputs, keeps)
    subject, memcpy = (partial(inputs.evict, out), pytorch.copy_warm) if warm else (inputs.evict, pytorch.clone)
    bench.time("evict", mode, shape, subject, {"memcpy": memcpy(rows), **others}, shape.moved_bytes)


@each("shape", *map(Shape, LENGTHS), Shape(8192, skewed=True), Shape(131072, skewed=True))
@each("mode", *MODES)
def test_evict(bench: Bench, mode: str, shape: Shape) -> None:
    """Skewed: one head with 40 % of the budget."""
    race(bench, mode, shape)


@each("shape", *map(Shape, LENGTHS[:2]))
def test_cold_caches(bench: Bench, shape: Shape) -> None:
    """Short contexts fit in the caches of a CPU; a real cache may just have left them."""
    if bench.device != "cpu":
        pytest.skip("the sweep over L has cold caches there")
    race(bench, "cold", shape)


@each(
    "shape",
    *(Shape(length, heads, batch) for batch, heads, length in ((1, 2, 32768), (1, 32, 8192), (4, 8, 8192))),
    *(Shape(32768, retention=retention) for retention in (0.05, 0.3, 0.5)),
    *(Shape(32768, dtype=dtype) for dtype in (torch.float32, torch.float8_e4m3fn)),
    Shape(32768, score_dtype=torch.bfloat16),
    Shape(32768, dim=64),
)
def test_other_shapes(bench: Bench, shape: Shape) -> None:
    race(bench, bench.sweep, shape)


def test_tiny(bench: Bench) -> None:
    """Nothing but the overhead of the call, which counts when decoding."""
    race(bench, "fresh", Shape(16, heads=2, dim=8, retention=0.5))


@each("shape", Shape(8192), Shape(131072))
def test_in_place(bench: Bench, shape: Shape) -> None:
    """evict_ beside evict and a composition that copies the kept rows back.

    Every round evicts what the last one left: the same positions, so the same work.
    """
    whole = make_inputs(shape, bench.device)
    inputs = Inputs(shape, whole.k.clone(), whole.v.clone(), whole.scores)
    out = whole.evict()
    others = {
        "memcpy": pytorch.copy_warm([out.k, out.v]),
        "evict": whole.evict,
        "best, copied back": pytorch.best_in_place(inputs),
        **bench.admit(lambda: rivals.IN_PLACE, inputs, lambda _: True),
    }
    subject = partial(lkv_ext.evict_, inputs.k, inputs.v, inputs.scores, inputs.budgets)
    bench.time("evict_", "warm", shape, subject, others, shape.moved_bytes)
