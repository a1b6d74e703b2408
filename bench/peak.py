"""Peak memory of one call beyond its inputs and result, as a child process: `peak.py OP LENGTH DEVICE` prints bytes.

On the CPU this is the resident set at its highest, so it counts every allocation, not only those of torch.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch
from shapes import Inputs, Shape, make_inputs
from timing import Call

import lkv_ext


def resident(name: str) -> int:
    """`VmRSS` now or `VmHWM`, the highest since it was reset, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_on_cpu(call: Call) -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest starts again from now
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def peak_on_cuda(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def calls(inputs: Inputs) -> dict[str, Call]:
    """The result of evict lies in memory that is there already, so that all that is counted is scratch."""
    k, v, scores, budgets = inputs.k, inputs.v, inputs.scores, inputs.shape.budgets
    out = lkv_ext.evict(k, v, scores, budgets)
    return {
        "evict": lambda: lkv_ext.evict(k, v, scores, budgets, out=out),
        "evict_": lambda: lkv_ext.evict_(k, v, scores, budgets),
    }


def main(op: str, length: str, device: str) -> None:
    torch.set_num_threads(2)
    with torch.inference_mode():
        calls(make_inputs(Shape(1024), device))[op]()  # libraries, threads and their stacks are no scratch
        call = calls(make_inputs(Shape(int(length)), device))[op]
        print(peak_on_cuda(call) if device == "cuda" else peak_on_cpu(call))


if __name__ == "__main__":
    main(*sys.argv[1:])
