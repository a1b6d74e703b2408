"""The C++ libraries, installed: an engine finds them, links them and evicts in its own buffers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lkv_ext
from lkv_ext import layout

ROOT = Path(__file__).resolve().parents[1]
BIN = str(Path(sys.executable).parent)
CMAKE, NINJA = (shutil.which(name, path=BIN) or shutil.which(name) for name in ("cmake", "ninja"))
pytestmark = pytest.mark.skipif(CMAKE is None or NINJA is None, reason="needs cmake and ninja")

CUDA_ENGINE = """
cmake_minimum_required(VERSION 3.25)
project(engine LANGUAGES CXX)
find_package(lkv REQUIRED COMPONENTS cpu cuda)
add_executable(engine engine.cpp)
target_link_libraries(engine PRIVATE lkv::cpu lkv::cuda)
"""
CUDA_SOURCE = """
#include <lkv/cpu.h>
#include <lkv/cuda.h>
#include <cstdio>
int main() {
  int32_t number = 7, *nowhere = nullptr;
  const lkv::cuda::Status status = lkv::cuda::upload({&number, nowhere, sizeof number}, nullptr);
  std::printf("%s, %s", lkv::cpu::isa(), lkv::cuda::describe(status));
}
"""


def cmake(*arguments: object) -> str:
    done = subprocess.run([CMAKE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configure(source: Path, build: Path, *definitions: str) -> str:
    return cmake("-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}", *definitions)


def build_engine(source: Path, folder: Path, installed: Path) -> str:
    """What the engine prints."""
    configure(source, folder, f"-DCMAKE_PREFIX_PATH={installed}")
    cmake("--build", folder)
    return subprocess.run([folder / "engine"], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build without Python, and where it was installed."""
    folder = tmp_path_factory.mktemp("cpp")
    # Neither an interpreter nor pybind11 may be needed.
    hidden = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("Python", "Python3", "pybind11")]
    configure(ROOT, folder / "build", "-DLKV_PYTHON=OFF", "-DLKV_CUDA=OFF", *hidden)
    cmake("--build", folder / "build")
    cmake("--install", folder / "build", "--prefix", folder / "prefix")
    return folder / "prefix"


def test_the_example_evicts_what_the_operator_evicts(installed: Path, tmp_path: Path) -> None:
    printed = build_engine(ROOT / "examples" / "engine", tmp_path, installed)
    found = [list(map(float, re.findall(r"\d+(?:\.\d+)?(?:e\+\d+)?", line))) for line in printed.splitlines()]
    batch, heads, length, dim = 2, 2, 1000, 64
    k = torch.arange(batch * heads * length * dim, dtype=torch.float32).view(batch, heads, length, dim)
    scores = (torch.arange(batch * heads * length) * 7919 % 1009).float().view(batch, heads, length)
    kept = lkv_ext.evict(k, k, scores, [100, 300], window=16)
    expected = []
    for row in range(batch * heads):
        begin, count = int(kept.cu_seqlens[row]), int(kept.lengths.flatten()[row])
        first, last = kept.positions[begin], kept.positions[begin + count - 1]
        expected.append([row, count, length, int(first), int(last), float(f"{kept.k[begin, 0]:g}")])
    page, pages = 16, 63
    pool = torch.arange(batch * pages * 2 * page * heads * dim, dtype=torch.float32)
    k, v = layout.flashinfer(pool.view(batch * pages, 2, page, heads, dim), "NHD")
    tables = (torch.arange(batch * pages) * 37 % (batch * pages)).view(batch, pages)
    index = lkv_ext.evict_paged_([k, v], scores, [100, 300], tables, [length] * batch, window=16, check=True)
    for b in range(batch):
        first = k[tables[b, 0], 0, 0, 0]
        expected.append([b, int(index.free_pages[b]), pages, float(f"{first:g}")])
    assert found == expected and expected[-1][1] == pages - 19  # 300 rows of 16 to a page


def test_nothing_but_headers_libraries_and_the_package_is_installed(installed: Path) -> None:
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    headers = {f"include/lkv/{path.name}" for path in (ROOT / "csrc" / "include" / "lkv").iterdir()}
    assert headers <= files
    rest = {Path(name).name for name in files - headers}
    assert {"liblkv_cpu.a", "lkv-config.cmake", "lkv-config-version.cmake", "lkv-targets.cmake"} <= rest
    assert not [name for name in rest if "python" in name.lower() or name.endswith((".so", ".py"))]


def test_a_part_that_was_not_built_is_said(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(CUDA_ENGINE)
    wrong = [CMAKE, "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
    done = subprocess.run([*wrong, f"-DCMAKE_PREFIX_PATH={installed}"], capture_output=True, text=True)
    assert done.returncode != 0 and "built without lkv::cuda" in done.stderr


def test_cuda_kernels_link_into_an_engine_without_nvcc(tmp_path: Path) -> None:
    builds = [folder for folder in (ROOT / "build").glob("cmake-*") if list(folder.rglob("liblkv_cuda.a"))]
    if not builds:
        pytest.skip("the package was not built here with CUDA kernels")
    cmake("--install", builds[0], "--prefix", tmp_path / "prefix", "--component", "cpp")
    (tmp_path / "CMakeLists.txt").write_text(CUDA_ENGINE)
    (tmp_path / "engine.cpp").write_text(CUDA_SOURCE)
    printed = build_engine(tmp_path, tmp_path / "build", tmp_path / "prefix")
    if not torch.cuda.is_available():  # the error of a launch names what is missing
        assert re.fullmatch(r"(avx512|avx2|portable), .*(driver|device).*", printed)
