"""The benchmark's rivals move the rows that evict moves; those that are missing or fail are left out with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import rows_of, scores_of

import lkv_ext

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import resources  # noqa: E402
import rivals  # noqa: E402
import rivals_cuda  # noqa: E402
import rivals_torch as pytorch  # noqa: E402
from inputs import Inputs, make_inputs  # noqa: E402
from shapes import Shape  # noqa: E402

SCORES = ("normal", "ties", "constant", "minus_infinity", "nan_and_infinity", "signed_zeros")


@dataclass(frozen=True)
class Given(Shape):
    """A shape with budgets of its own for the heads."""

    counts: tuple[int, ...] = ()

    @property
    def budgets(self) -> list[int]:
        return list(self.counts)


def given(kind: str, score_dtype: torch.dtype, length: int, device: str) -> Inputs:
    shape = Given(length, heads=4, dim=10, score_dtype=score_dtype, counts=(0, length, length // 3, 1))
    sizes = (shape.batch, shape.heads, length, shape.dim)
    k, v = (rows_of(sizes, shape.dtype, seed).to(device) for seed in range(2))
    return Inputs(shape, k, v, scores_of(kind, sizes[:3], 2).to(device, score_dtype))


def check_triton(device: str) -> None:
    """Rows that one program holds and rows of many chunks, every type of scores, budgets from none to all."""
    import rivals_triton

    rivals_triton.CHUNK = 128
    for short, length in ((16384, 300), (0, 300), (0, 128)):
        rivals_triton.SHORT = short
        for score_dtype in rivals_triton.ROUNDS:
            for kind in SCORES:
                inputs = given(kind, score_dtype, length, device)
                out = lkv_ext.evict(inputs.k, inputs.v, inputs.scores, inputs.shape.budgets)
                moved = rivals_triton.evict(inputs)()
                assert rivals.same_bytes(moved, [out.k, out.v]), f"{kind}, {score_dtype}, {length}, short {short}"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton(device: str) -> None:
    if device == "cuda":
        return check_triton(device)
    # triton decides on import whether it interprets: in a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("skewed", [False, True])
def test_compositions(skewed: bool) -> None:
    inputs = make_inputs(Shape(256, heads=3, batch=2, dim=4, skewed=skewed), "cpu")
    out = lkv_ext.evict(inputs.k, inputs.v, inputs.scores, inputs.shape.budgets)
    uniform = (pytorch.naive, pytorch.best, pytorch.best_by_mask, pytorch.best_out)
    ragged = (pytorch.loop, pytorch.best_ragged, pytorch.best_batched)
    for make in ragged if skewed else uniform:
        assert rivals.same_bytes(make(inputs)(), [out.k, out.v]), make.__name__


def test_who_fails_is_left_out() -> None:
    inputs = make_inputs(Shape(64, heads=2, dim=4), "cpu")

    def breaks(_: Inputs) -> rivals.Call:
        raise OSError("no compiler\nand more")

    def wrong(inputs: Inputs) -> rivals.Call:
        return lambda: inputs.payload

    makers = {"best": pytorch.best, "breaks": breaks, "wrong": wrong}
    out = lkv_ext.evict(inputs.k, inputs.v, inputs.scores, inputs.shape.budgets)
    calls, missing = rivals.admit(makers, inputs, rivals.keeps(inputs.shape, [out.k, out.v]))
    assert list(calls) == ["best"]
    assert missing == {"breaks": "OSError: no compiler", "wrong": "ValueError: keeps other rows than evict"}


RACES = """
import sys
import bench_evict, bench_layers, bench_select
from conftest import Bench
from shapes import Shape

bench = object.__new__(Bench)
bench.device, bench._everybody = "cpu", False
bench.time = lambda *case: None
bench_evict.race(bench, "fresh", Shape(64))
bench_evict.test_in_place(bench, Shape(64))
bench_layers.race(bench, "fresh", Shape(64, layers=2))
bench_select.test_select(bench, Shape(64))
assert "rivals_cuda" not in sys.modules
"""


def test_who_does_not_run_is_not_compiled() -> None:
    """On a CPU and with `--rivals torch`: to name CUB's rivals, their library is needed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), *sys.path])}
    result = subprocess.run([sys.executable, "-c", RACES], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("length", [4096, 40000])
def test_everybody_moves_the_same(skewed: bool, length: int) -> None:
    inputs = make_inputs(Shape(length, heads=4, skewed=skewed), "cuda")
    out = lkv_ext.evict(inputs.k, inputs.v, inputs.scores, inputs.shape.budgets)
    keeps = rivals.keeps(inputs.shape, [out.k, out.v])
    calls, missing = rivals.admit(rivals.of_evict(inputs.shape), inputs, keeps)
    assert calls
    assert not [name for name, why in missing.items() if "other rows" in why]


@pytest.mark.slow
def test_cuda_source_compiles() -> None:
    """Against the newest CUB that is here: build asks for no warnings."""
    try:
        rivals_cuda.include_folders()
    except RuntimeError as error:
        pytest.skip(str(error))
    if resources.find_nvcc() is None:
        pytest.skip("needs nvcc")
    assert rivals_cuda.build("90").exists()


if __name__ == "__main__":
    check_triton("cpu")
