"""Eviction in place by end, order and memory: beside `evict_` to the front, a new pool, and head after head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import rivals_torch as pytorch
import torch
from conftest import Bench, each
from inputs import Inputs, make_inputs
from shapes import Shape
from torch import Tensor

import lkv_ext

HALF = (Shape(8192, retention=0.5), Shape(32768, retention=0.5))


@pytest.fixture
def inputs(bench: Bench, shape: Shape) -> Inputs:
    """Of our own, as they are written. Every round evicts what the last one left: the same positions, the same work."""
    shared = make_inputs(shape, bench.device)
    return Inputs(shape, shared.k.clone(), shared.v.clone(), shared.scores)


def in_place(inputs: Inputs, **options: object) -> Callable[[], object]:
    return partial(lkv_ext.evict_, inputs.k, inputs.v, inputs.scores, inputs.budgets, **options)


def pools_of(inputs: Inputs, page: int, *, per_head: bool) -> tuple[list[Tensor], Tensor]:
    """The memory of K and V as pages in random order, and their tables."""
    shape = inputs.shape
    heads = 1 if per_head else shape.heads
    pages = shape.batch * shape.heads * shape.length // (heads * page)
    pools = [t.view(pages, *([] if per_head else [heads]), page, shape.dim) for t in inputs.payload]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(page), dtype=torch.int32)
    tables = order.view(shape.batch, *([shape.heads] if per_head else []), shape.length // page)
    return pools, tables.to(inputs.k.device)


@each("shape", *HALF)
@each("to", "front", "back")
def test_any_order(bench: Bench, inputs: Inputs, shape: Shape, to: str) -> None:
    """Half as many rows move."""
    others = {"ascending": in_place(inputs, to=to), "evict": inputs.evict, "evict out=": inputs.evict_warm()}
    subject = in_place(inputs, to=to, order="any")
    moved = shape.score_bytes + shape.output_bytes  # half of the kept rows, in and out
    bench.time(f"evict_ any {to}", "warm", shape, subject, others, moved)


@each("shape", Shape(8192), *HALF)
def test_to_the_back(bench: Bench, inputs: Inputs, shape: Shape) -> None:
    bench.time(
        "evict_ back", "warm", shape, in_place(inputs, to="back"), {"front": in_place(inputs)}, shape.moved_bytes
    )


@each("shape", Shape(8192), *HALF)
@each("page", 16, 64)
@each("tables", "per head", "shared")
def test_paged(bench: Bench, inputs: Inputs, shape: Shape, page: int, tables: str) -> None:
    """Beside dense memory, and beside pools that are made anew."""
    pools, ids = pools_of(inputs, page, per_head=tables == "per head")
    subject = partial(lkv_ext.evict_paged_, pools, inputs.scores, inputs.budgets, ids)
    others = {
        "in place": in_place(inputs),
        "index_select": pytorch.best(inputs),
        "head by head": pytorch.head_by_head_in_place(inputs),
    }
    bench.time(f"evict_paged_ {page} {tables}", "warm", shape, subject, others, shape.moved_bytes)
