"""The CUDA half of the op library, from the public functions to the kernels, on the emulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.build import ROOT, SCHEDULES, build_root, checked, configure, environment, locked, missing_tool, program

pytest.importorskip("torch")

# What of a suite runs here: not float64, which is the CPU's alone, nor what takes long.
SUITES = {
    "test_parity.py": "",
    "test_properties.py": "evict_is or layers_are",
    "test_cache.py": "",
    "test_whole_cache.py": "",
    "test_paged.py": "reference or layers_in_one or stay_where",
    "test_soft_topk.py": "nothing_to_decide or not_there or largest or least or lengths or strides or empty or errors",
}
CAPABILITIES = ("80", "90")
SEEDS = int(os.environ.get("LKV_EMULATOR_SEEDS", "1"))  # of schedules that differ by seed
CHOSEN = [(schedule, seed, capability) for schedule in SCHEDULES for capability in CAPABILITIES
          for seed in range(1 if schedule in ("in_order", "reversed") else SEEDS)]  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Path:
    """With the sanitizers."""
    if tool := missing_tool():
        pytest.skip(f"the emulator is built with {tool}, which is not installed")
    folder = build_root() / "torch"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        source = ROOT / "tests" / "emulator" / "torch"
        flags = (f"-DPython_EXECUTABLE={sys.executable}", "-DLKV_EMULATOR_SANITIZE=ON", "-DLKV_EMULATOR_OPTIMIZE=-O1")
        checked(configure(source, folder, *flags))
        checked([program("cmake"), "--build", folder, "--parallel", "2"])
    return folder / "_torch_emulated.so"


def run(library: Path, suite: str, chosen: str, schedule: str, seed: int, capability: str) -> None:
    """The tests of a suite whose names have what is chosen, in a process of their own."""
    of_emulator = {
        "LKV_LIBRARY": str(library),
        "LKV_EMULATOR_EAGER": "1",
        "LKV_EMULATOR_SCHEDULE": schedule,
        "LKV_EMULATOR_SEED": str(seed),
        "LKV_EMULATOR_CAPABILITY": capability,
        "HYPOTHESIS_PROFILE": "small",
    }
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not cuda", "-k", chosen)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / suite)],
        env=environment(sanitize=True) | of_emulator,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("suite", SUITES)
def test_parity_with_the_reference(library: Path, suite: str, capability: str) -> None:
    run(library, suite, SUITES[suite], SCHEDULES[-1], 0, capability)


@pytest.mark.parametrize(("schedule", "seed", "capability"), CHOSEN)
def test_the_same_rows_everywhere(library: Path, schedule: str, seed: int, capability: str) -> None:
    """Packed, padded, in place and paged, to either end and in any order; `make test-schedules` has more seeds."""
    run(library, "test_paged.py", "same_rows", schedule, seed, capability)
