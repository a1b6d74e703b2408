"""The threads of the NumPy front end: every piece of work is done once, whatever its size and the number of threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
PROGRAM = r"""
#include <atomic>
#include <cstdio>
#include <vector>

#include "python/call_threads.cpp"

int main() {
  int wrong = 0;
  for (int64_t most : {1, 2, 3, 8})
    for (int64_t n : {0, 1, 2, 7, 16, 101})
      for (int64_t grain : {1, 5, 64}) {
        lkv::python::CallThreads threads(most, int64_t{1} << 40);
        std::vector<std::atomic<int>> done(n + 64);
        const lkv::cpu::Threads view = threads;
        view.parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++done[i];
        });
        for (int64_t i = 0; i < n + 64; ++i) wrong += done[i] != (i < n);
        if (view.count != most) ++wrong;
      }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_every_piece_is_done_once(tmp_path: Path) -> None:
    source, program = tmp_path / "ranges.cpp", tmp_path / "ranges"
    source.write_text(PROGRAM)
    include = [f"-I{CSRC}", f"-I{CSRC / 'include'}", f"-I{CSRC / 'python'}"]
    subprocess.run([COMPILER, "-std=c++20", "-O1", *include, source, "-o", program, "-pthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0 wrong\n" and done.returncode == 0
