"""The CUDA half of the op library, from the public functions to the kernels, on the emulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.build import ROOT, SCHEDULES, build_root, checked, configure, locked, missing_tool, program

pytest.importorskip("torch")


# What of a suite runs here: not float64, which is the CPU's alone, nor what takes long.
SUITES = {
    "test_parity.py": "",
    "test_cache.py": "",
    "test_whole_cache.py": "",
    "test_paged.py": "reference or same_rows or layers_in_one or stay_where",
    "test_soft_topk.py": "nothing_to_decide or not_there or largest or least or lengths or strides or empty or errors",
}


@pytest.fixture(scope="module")
def library() -> Path:
    if tool := missing_tool():
        pytest.skip(f"the emulator is built with {tool}, which is not installed")
    folder = build_root() / "torch"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        source = ROOT / "tests" / "emulator" / "torch"
        checked(configure(source, folder, f"-DPython_EXECUTABLE={sys.executable}"))
        checked([program("cmake"), "--build", folder, "--parallel", "2"])
    return folder / "_torch_emulated.so"


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("suite", SUITES)
def test_parity_with_the_reference(library: Path, suite: str, capability: str):
    environment = {
        **os.environ,
        "LKV_LIBRARY": str(library),
        "LKV_EMULATOR_EAGER": "1",
        "LKV_EMULATOR_SCHEDULE": SCHEDULES[-1],
        "LKV_EMULATOR_CAPABILITY": capability,
        "HYPOTHESIS_PROFILE": "small",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not cuda",
        "-k",
        SUITES[suite],
    ]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / suite)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
