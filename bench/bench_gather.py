"""gather beside torch.gather and index_select: the rows move, the positions are given."""

from __future__ import annotations

import pytest
import rivals
import torch
from conftest import Bench
from shapes import LENGTHS, Shape, make_inputs

import lkv_ext


def race(bench: Bench, shape: Shape) -> None:
    inputs = make_inputs(shape, bench.device)
    index = lkv_ext.select(inputs.scores, shape.budgets)
    moved = lkv_ext.gather(inputs.payload, index)
    positions = index.positions.view(shape.batch, shape.heads, -1)
    others = {
        "memcpy": rivals.clone(moved),
        "torch.gather": rivals.gather_4d(inputs, positions),
        "index_select": rivals.gather_rows(inputs, positions),
    }
    both_ways = 2 * shape.output_bytes + 4 * shape.kept
    bench.time("gather", "fresh", shape, lambda: lkv_ext.gather(inputs.payload, index), others, both_ways)


@pytest.mark.parametrize("length", LENGTHS)
def test_length(bench: Bench, length: int) -> None:
    race(bench, Shape(length))


@pytest.mark.parametrize("retention", [0.05, 0.5])
def test_retention(bench: Bench, retention: float) -> None:
    race(bench, Shape(32768, retention=retention))


@pytest.mark.parametrize("dtype, dim", [(torch.float32, 128), (torch.bfloat16, 64), (torch.bfloat16, 100)], ids=str)
def test_rows(bench: Bench, dtype: torch.dtype, dim: int) -> None:
    race(bench, Shape(32768, dtype=dtype, dim=dim))
