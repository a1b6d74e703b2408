"""bench/prediction.py: bytes against the tables of the specification, occupancy by hand, and what must grow."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import model  # noqa: E402
import report  # noqa: E402
import targets  # noqa: E402
from inputs import index_of, runs_of  # noqa: E402
from prediction import GATHER, H100, H200, Kernel, make_plan, predict  # noqa: E402
from results import Result, Run  # noqa: E402
from shapes import Shape  # noqa: E402

import lkv_ext  # noqa: E402


@pytest.mark.parametrize(
    "length, batch, layers, retention, floor",
    [
        (4096, 1, 1, 0.15, 1.2),
        (32768, 1, 1, 0.30, 19.0),
        (131072, 1, 1, 0.15, 38.4),
        (131072, 1, 1, 0.50, 125.8),
        (8192, 8, 1, 0.30, 37.9),
        (4096, 1, 32, 0.15, 38.4),
        (32768, 1, 32, 0.15, 307.5),
        (131072, 1, 32, 0.15, 1229.8),
    ],
)
def test_floors(length: int, batch: int, layers: int, retention: float, floor: float) -> None:
    """All bytes at 4.3 TB/s, in us."""
    shape = Shape(length, batch=batch, retention=retention, layers=layers)
    assert predict(H200, shape).floor_us == pytest.approx(floor, abs=0.06, rel=2e-4)


def test_bytes() -> None:
    shape = Shape(131072)
    assert shape.score_bytes == 8 * 131072 * 4
    assert 2 * shape.output_bytes == pytest.approx(161e6, rel=1e-3)
    assert predict(H200, shape, "select").floor_us == pytest.approx(shape.score_bytes / H200.copy_rate / 1e3)
    assert Shape(131072, layers=32).moved_bytes == 32 * shape.moved_bytes


@pytest.mark.parametrize(
    "kernel, blocks",
    [
        (Kernel(threads=512, registers=64), 2),  # 32768 of 65536 registers each
        (Kernel(threads=256, registers=40), 6),  # 8 warps of 1280: 10240
        (Kernel(threads=256, registers=33), 6),  # as 40: registers are handed out by 256 a warp
        (Kernel(threads=256, registers=32), 8),  # 2048 threads
        (Kernel(threads=32, registers=16), 32),  # slots
        (Kernel(threads=128, registers=16, shared=100 << 10), 2),  # 101 KB each, with 1 KB for the system
        (Kernel(threads=128, registers=16, shared=(113 << 10) + 1), 1),  # two would pass 228 KB
        (Kernel(threads=128, registers=16, shared=113 << 10), 2),
    ],
)
def test_occupancy(kernel: Kernel, blocks: int) -> None:
    assert kernel.per_multiprocessor(H200) == blocks


def test_occupancy_beside_another_kernel() -> None:
    select = Kernel(threads=512, registers=64, shared=20784 + (128 << 10))
    assert select.per_multiprocessor(H200) == 1
    assert GATHER.per_multiprocessor(H200, beside=select) == 2  # the other half of the registers
    assert GATHER.per_multiprocessor(H200, beside=Kernel(threads=2048, registers=32)) == 0


def test_plans() -> None:
    """What csrc/cuda/select_sizes.h comes to on 132 multiprocessors."""
    tiny, short, middle, long = (make_plan(H200, Shape(length)) for length in (256, 8192, 32768, 131072))
    assert (tiny.cluster, tiny.keys_in, tiny.launches) == (1, "registers", 3)
    assert (short.cluster, short.keys_in, short.launches) == (4, "registers", 3)
    assert (middle.cluster, middle.keys_in, middle.launches) == (16, "registers", 3)
    assert (long.cluster, long.keys_in, long.waves) == (16, "shared", 1)
    whole = make_plan(H200, Shape(131072, layers=32))
    assert (whole.cluster, whole.keys, whole.per_multiprocessor) == (4, 32768, 1)
    assert whole.blocks <= H200.multiprocessors
    huge = make_plan(H200, Shape(1 << 21))
    assert (huge.cluster, huge.keys_in, huge.waves) == (8, "memory", 1)  # of 16 blocks, seven run at once


@pytest.mark.parametrize("gpu", [H200, H100], ids=lambda gpu: gpu.name)
def test_time_grows_with_length_and_retention(gpu) -> None:
    for layers in (1, 32):
        lengths = [predict(gpu, Shape(1 << power, layers=layers)).total_us for power in range(10, 18)]
        assert lengths == sorted(lengths)
        kept = [predict(gpu, Shape(32768, retention=t / 10, layers=layers)).total_us for t in range(1, 11)]
        assert kept == sorted(kept)


def test_nothing_beats_its_floor_or_a_slower_card() -> None:
    for work in model.works().values():
        found = predict(H200, *work)
        assert found.floor_us < found.total_us <= found.launch_us + found.select_us + found.gather_us
        assert found.total_us <= predict(H100, *work).total_us
        assert found.total_us <= predict(replace(H200, row_share=0.8), *work).total_us


def run_of(*results: Result) -> Run:
    return Run("cuda", {"gpu": "NVIDIA H200"}, list(results))


def test_targets_are_found_in_a_run() -> None:
    shape, whole = Shape(131072), Shape(131072, layers=32)
    run = run_of(
        Result("evict", "graph", str(shape), us=50.0, retention=0.15, ratios={"best": 4.0, "triton": 1.2}),
        Result("evict", "cold", str(Shape(8192, skewed=True)), us=9.0, retention=0.15, ratios={"loop": 6.0}),
        Result("evict", "graph", str(Shape(8192, skewed=True)), us=9.0, retention=0.15, ratios={"uniform": 0.95}),
        Result("evict_layers 32", "graph", str(whole), us=1300.0, retention=0.15),
        Result("ceiling random", "graph", str(shape), us=40.0, gbps=whole.moved_bytes / 1200 / 1e3, retention=0.15),
    )
    measured = {target.name: target.measure(run) for target in targets.GPU_TARGETS}
    found = {name: value.value for name, value in measured.items() if value is not None}
    assert found == {
        "evict, L=131072": 50,
        "evict_layers, 32 x L=131072": 1300,
        "evictions over 256 MB: share of the gather's ceiling": pytest.approx(1200 / 1300),
        "skewed budgets, L=8192: speed of uniform ones": 0.95,
        "any eviction: speed over rivals with stock gathers": 1.2,
        "ragged budgets: speed over PyTorch": 6,
    }
    table = report.targets_table(run)
    assert "| at most 55 us | " in table and "| 50.0 us | met | evict graph" in table
    assert "| 1.20x | missed by less than a tenth | triton, evict graph" in table
    assert table.count("not measured") == len(targets.GPU_TARGETS) - len(found)
    assert "| random | " in report.ceilings(run)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(4096),
        Shape(32768, heads=2, batch=3, skewed=True, retention=0.05),
        Shape(1024, dim=64, dtype=torch.float8_e4m3fn, score_dtype=torch.bfloat16, layers=16),
    ],
)
def test_shape_of_a_result(shape: Shape) -> None:
    op = "evict" if shape.layers == 1 else f"evict_layers {shape.layers}"
    found = Result(op, "graph", str(shape), us=1.0)
    assert list(targets.evictions(run_of(found, Result("select", "graph", str(shape), us=1.0)))) == [(found, shape)]


@pytest.mark.parametrize("run", [1, 4, 16, 4096])
def test_rows_of_the_ceiling(run: int) -> None:
    """Positions ascend in runs, and gather takes them."""
    shape = Shape(1024, heads=3, dim=4, retention=0.3)
    positions = runs_of(shape, run, "cpu")
    assert positions.shape == (1, 3, 307)
    steps = positions.diff(dim=-1)
    assert steps.min() >= 1 and positions.max() < shape.length
    assert (steps > 1).sum() <= 3 * -(-307 // run)
    k = torch.arange(3 * 1024 * 4).view(1, 3, 1024, 4)
    moved = lkv_ext.gather([k], index_of(positions))[0]
    assert torch.equal(moved, k.gather(2, positions[..., None].expand(-1, -1, -1, 4)).view(-1, 4))


def test_docs_say_what_the_model_says() -> None:
    """After a change of the model: `python bench/model.py` into docs/gpu.md."""
    assert model.predictions(H200) in (ROOT / "docs" / "gpu.md").read_text()


def test_command_line() -> None:
    command = [sys.executable, str(ROOT / "bench" / "model.py"), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert set(found["predictions"]) == set(model.works())
