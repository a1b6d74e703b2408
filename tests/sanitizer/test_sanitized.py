"""The operators under AddressSanitizer and UndefinedBehaviorSanitizer: both extensions, in a build of their own.

The suites are those of `tests`, with few examples. They run in a process into which the sanitizers are loaded first.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness.build import ROOT, checked, configure, environment, locked, missing_tool, program

pytest.importorskip("torch")
pytest.importorskip("pybind11")

FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
KERNELS = ("test_properties.py", "test_concurrent_writes.py")
SUITES = {
    "best": (
        *(*KERNELS, "test_raw_ops.py", "test_numpy.py", "test_numpy_errors.py"),
        *("test_cache.py", "test_whole_cache.py", "test_attend.py", "test_attend_paged.py"),
    ),
    "avx2": KERNELS,
    "portable": KERNELS,
}
# These start processes, compile or load models: they take long here and run nothing that others do not.
APART = "not instruction_sets and not without_torch and not compile and not gpt_oss"


@pytest.fixture(scope="module")
def folder() -> Path:
    if tool := missing_tool():
        pytest.skip(f"the sanitized library is built with {tool}, which is not installed")
    folder = ROOT / "build" / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"-DCMAKE_CXX_FLAGS={FLAGS}", "-DCMAKE_BUILD_TYPE=None", "-DLKV_CUDA=OFF", "-DLKV_TORCH=ON"]
    with locked(folder.with_suffix(".lock")):
        if not (folder / "CMakeCache.txt").exists():
            checked(configure(ROOT, folder, *options, f"-DPython_EXECUTABLE={sys.executable}"))
        checked([program("cmake"), "--build", folder, "--target", "_torch", "_C", "--parallel", "2"])
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own; a report of the sanitizers ends it, and stands on stderr."""
    options = ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "-m", "not cuda", "-k", APART]
    command = [sys.executable, Path(__file__).with_name("worker.py"), folder, *options, *arguments]
    variables |= {"HYPOTHESIS_PROFILE": "small", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(
        command, env=environment(sanitize=True) | variables, capture_output=True, text=True, cwd=ROOT, timeout=600
    )


@pytest.mark.parametrize("isa", SUITES)
def test_no_report(folder: Path, isa: str) -> None:
    forced = {} if isa == "best" else {"LKV_CPU_ISA": isa}
    done = run(folder, *(str(ROOT / "tests" / suite) for suite in SUITES[isa]), **forced)
    if f"LKV_CPU_ISA={isa} is not available here" in done.stdout:
        pytest.skip(f"this machine does not run {isa}")
    assert done.returncode == 0, done.stderr[:6000] + done.stdout[-3000:]
    assert " passed" in done.stdout and "ERROR: AddressSanitizer" not in done.stderr


PLANTED = """
import ctypes
import numpy as np
import torch
import lkv_ext
import lkv_ext.numpy

def test_planted():
    memory = (ctypes.c_float * 16)()
    rows = np.ctypeslib.as_array(ctypes.cast(memory, ctypes.POINTER(ctypes.c_float)), (1, 1, 5, 4))
    scores = np.arange(5, dtype=np.float32).reshape(1, 1, 5)
    CALL
"""


@pytest.mark.parametrize(
    "call",
    [
        "lkv_ext.evict(torch.from_numpy(rows), None, torch.from_numpy(scores), 1)",
        "lkv_ext.numpy.evict(rows, None, scores, 1)",
    ],
)
def test_faults_are_reported(folder: Path, tmp_path: Path, call: str) -> None:
    """Both extensions are watched: an array that says it is longer than its memory ends the process with a report."""
    (tmp_path / "test_planted.py").write_text(PLANTED.replace("CALL", call))
    done = run(folder, str(tmp_path / "test_planted.py"))
    assert done.returncode != 0 and "ERROR: AddressSanitizer: heap-" in done.stderr
