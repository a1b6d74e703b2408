"""gather beside torch.gather and index_select, and its ceiling: what evict can reach at best on a card.

Rows that lie next to each other need fewer memory pages; how real ones lie depends on the scores: pooled ones come in
runs. The ceiling is measured as graphs, which a CPU has none of.
"""

from __future__ import annotations

from functools import partial

import rivals_torch as pytorch
import torch
from conftest import Bench, each
from inputs import index_of, make_inputs, runs_of
from shapes import LENGTHS, Shape

import lkv_ext

CEILING = 131072


@each(
    "shape",
    *map(Shape, LENGTHS),
    *(Shape(32768, retention=retention) for retention in (0.05, 0.5)),
    Shape(32768, dtype=torch.float32),
    *(Shape(32768, dim=dim) for dim in (64, 100)),
)
def test_gather(bench: Bench, shape: Shape) -> None:
    inputs = make_inputs(shape, bench.device)
    index = lkv_ext.select(inputs.scores, shape.budgets)
    positions = index.positions.view(shape.batch, shape.heads, -1)
    subject = partial(lkv_ext.gather, inputs.payload, index)
    others = {
        "memcpy": pytorch.clone(subject()),
        "torch.gather": pytorch.gather_4d(inputs, positions),
        "index_select": pytorch.gather_rows(inputs, positions),
    }
    bench.time("gather", "fresh", shape, subject, others, 2 * shape.output_bytes + 4 * shape.kept)


@each("mode", "graph")
@each(
    "rows, run, retention",
    ("contiguous", CEILING, 0.15),
    *(("random", 1, retention) for retention in (0.15, 0.3, 0.5)),
    *((f"runs of {run}", run, 0.15) for run in (4, 8, 16)),
)
def test_ceiling(bench: Bench, mode: str, rows: str, run: int, retention: float) -> None:
    """Rows of 256 bytes at given positions, beside a memcpy of as many bytes."""
    shape = Shape(CEILING, retention=retention)
    inputs, positions = make_inputs(shape, bench.device), runs_of(shape, run, bench.device)
    subject = partial(lkv_ext.gather, inputs.payload, index_of(positions))
    others = {
        "memcpy": pytorch.clone(subject()),
        "index_select": pytorch.gather_rows(inputs, positions),
    }
    bench.time(f"ceiling {rows}", mode, shape, subject, others, 2 * shape.output_bytes + 4 * shape.kept)


@each("mode", "graph")
def test_launch(bench: Bench, mode: str) -> None:
    """What a graph costs that has nothing to do, and one with a kernel of one block: the model's `launch_us`."""
    shape = Shape(1, heads=1, dim=1)
    one = make_inputs(shape, bench.device).k
    bench.time("graph of nothing", mode, shape, lambda: None, {"of one kernel": one.zero_}, 0)
