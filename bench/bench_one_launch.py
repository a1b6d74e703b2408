"""Small evictions in one launch, and as a select with a gather beside it: which is faster from where on."""

from __future__ import annotations

import pytest
from bench_evict import evict, moved_bytes
from conftest import Bench
from shapes import Shape, make_inputs
from switches import switched


@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "skewed"])
@pytest.mark.parametrize("length", [256, 512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("mode", ["graph"])
def test_one_launch(bench: Bench, mode: str, length: int, skewed: bool) -> None:
    inputs = make_inputs(Shape(length, skewed=skewed), bench.device)
    ways = {name: switched(evict(inputs), "LKV_CUDA_EVICT", name) for name in ("fused", "pair")}
    bench.time("evict, by size", mode, inputs.shape, evict(inputs), ways, moved_bytes(inputs.shape))
