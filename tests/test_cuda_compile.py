"""Every CUDA source compiles for each generation without a warning; the hot kernels keep all they hold in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 120)
HOT = re.compile(r"select_kernel|split_\w+_kernel|gather_kernel|append_kernel|attend_\w*kernel|soft_topk_\w*kernel")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)


class Kernel(NamedTuple):
    name: str
    arch: int
    stack: int  # bytes of local memory per thread
    spills: int  # bytes stored and loaded


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH", "/usr/local/cuda"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def parse_report(log: str) -> list[Kernel]:
    return [
        Kernel(m["name"], int(m["arch"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in REPORT.finditer(log)
    ]


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_or_spills(source: Path, tmp_path: Path) -> None:
    command = [find_nvcc(), "-c", str(source), "-o", str(tmp_path / "out.o"), "-O3", "-std=c++20", "-lineinfo"]
    command += ["-I", str(ROOT / "csrc" / "include"), "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    command += ["-Xptxas", "-v"]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log

    kernels = parse_report(log)
    assert {kernel.arch for kernel in kernels} == set(ARCHITECTURES), log
    hot = [kernel for kernel in kernels if HOT.search(kernel.name)]
    assert hot or source.stem not in ("select", "gather", "append", "attend", "soft_topk"), log
    assert not [kernel for kernel in hot if kernel.stack or kernel.spills]


def test_report_parser_sees_spills() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z13gather_kernelv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z13gather_kernelv\n"
        "    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
    )
    assert parse_report(log) == [Kernel("_Z13gather_kernelv", 90, 16, 12)]
