"""The ceiling of a gather: rows of 256 bytes at given positions, beside a memcpy of as many bytes.

What evict can reach at best on a card. Rows that lie next to each other need fewer memory pages; how real ones lie
depends on the scores: pooled ones come in runs.
"""

from __future__ import annotations

import pytest
import rivals
from conftest import Bench
from positions import index_of, runs_of
from shapes import Shape, make_inputs
from switches import switched
from torch import Tensor

import lkv_ext

LENGTH = 131072
RUNS = (1, 4, 8, 16)


def race(bench: Bench, name: str, mode: str, shape: Shape, run: int) -> None:
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


# A graph, which a CPU has none of: what is asked for is the ceiling of a card.


@pytest.mark.parametrize("mode", ["graph"])
def test_launch(bench: Bench, mode: str) -> None:
    """What a graph costs that has nothing to do, and one with a kernel of one block: the model's `launch_us`."""
    one = make_inputs(Shape(1, heads=1, dim=1), bench.device).k
    bench.time("graph of nothing", mode, Shape(1, heads=1, dim=1), lambda: None, {"of one kernel": one.zero_}, 0)


@pytest.mark.parametrize("mode", ["graph"])
def test_contiguous(bench: Bench, mode: str) -> None:
    race(bench, "contiguous", mode, Shape(LENGTH), run=LENGTH)


@pytest.mark.parametrize("retention", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("mode", ["graph"])
def test_random(bench: Bench, mode: str, retention: float) -> None:
    race(bench, "random", mode, Shape(LENGTH, retention=retention), run=1)


@pytest.mark.parametrize("run", RUNS[1:])
@pytest.mark.parametrize("mode", ["graph"])
def test_runs(bench: Bench, mode: str, run: int) -> None:
    race(bench, f"runs of {run}", mode, Shape(LENGTH), run)
