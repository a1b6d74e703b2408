"""gather beside torch.gather and index_select, and its ceiling: what evict can reach at best on a card.

Rows that lie next to each other need fewer memory pages; how real ones lie depends on the scores: pooled ones come in
runs. The ceiling is measured as graphs, which a CPU has none of.
"""

from __future__ import annotations

import pytest
import rivals
import torch
from conftest import Bench
from shapes import LENGTHS, Shape, index_of, make_inputs, runs_of
from timing import switched
from torch import Tensor

import lkv_ext

CEILING = 131072
RUNS = (4, 8, 16)
graph = pytest.mark.parametrize("mode", ["graph"])


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


def ceiling(bench: Bench, name: str, mode: str, shape: Shape, run: int) -> None:
    """Rows of 256 bytes at given positions, beside a memcpy of as many bytes and the bulk copies."""
    inputs = make_inputs(shape, bench.device)
    positions = runs_of(shape, run, bench.device)
    index = index_of(positions)

    def subject() -> list[Tensor]:
        return lkv_ext.gather(inputs.payload, index)

    others = {
        "memcpy": rivals.clone(subject()),
        "bulk copies": switched(subject, "LKV_CUDA_GATHER", "bulk"),
        "index_select": rivals.gather_rows(inputs, positions),
    }
    bench.time(f"ceiling {name}", mode, shape, subject, others, 2 * shape.output_bytes + 4 * shape.kept)


@graph
def test_launch(bench: Bench, mode: str) -> None:
    """What a graph costs that has nothing to do, and one with a kernel of one block: the model's `launch_us`."""
    one = make_inputs(Shape(1, heads=1, dim=1), bench.device).k
    bench.time("graph of nothing", mode, Shape(1, heads=1, dim=1), lambda: None, {"of one kernel": one.zero_}, 0)


@graph
def test_contiguous(bench: Bench, mode: str) -> None:
    ceiling(bench, "contiguous", mode, Shape(CEILING), run=CEILING)


@pytest.mark.parametrize("retention", [0.15, 0.3, 0.5])
@graph
def test_random(bench: Bench, mode: str, retention: float) -> None:
    ceiling(bench, "random", mode, Shape(CEILING, retention=retention), run=1)


@pytest.mark.parametrize("run", RUNS)
@graph
def test_runs(bench: Bench, mode: str, run: int) -> None:
    ceiling(bench, f"runs of {run}", mode, Shape(CEILING), run)
