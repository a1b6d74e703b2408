"""Peak memory of one call beyond its inputs and result, as a child process: `peak.py OP LENGTH DEVICE` prints bytes.

On the CPU this is the resident set at its highest, so it counts every allocation, not only those of torch.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from inputs import make_inputs
from shapes import Shape
from timing import Call

import lkv_ext


def of_a_child(script: str, *arguments: object, **environment: str) -> int:
    """The bytes that a script of this folder prints."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = {**os.environ, **environment}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def resident(name: str) -> int:
    """`VmRSS` now or `VmHWM`, the highest since it was reset, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(call: Call, device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest starts again from now
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def call_of(op: str, length: int, device: str) -> Call:
    """The result of evict lies in memory that is there already, so that all that is counted is scratch."""
    inputs = make_inputs(Shape(length), device)
    arguments = (inputs.k, inputs.v, inputs.scores, inputs.shape.budgets)
    out = lkv_ext.evict(*arguments)
    return (lambda: lkv_ext.evict(*arguments, out=out)) if op == "evict" else lambda: lkv_ext.evict_(*arguments)


def main(op: str, length: str, device: str) -> None:
    torch.set_num_threads(2)
    with torch.inference_mode():
        call_of(op, 1024, device)()  # libraries, threads and their stacks are no scratch
        print(measure(call_of(op, int(length), device), device))


if __name__ == "__main__":
    main(*sys.argv[1:])
