"""How much memory an eviction takes beside its output: measured as the peak of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of resident memory")

# Prints what `op` adds to the peak of resident memory, and what stays of it, beside the size of the cache.
MEASURE = """
import sys
import torch
import lkv_ext

def peak(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024

heads, tokens, dim = 8, 65536, 128
k, v = (torch.ones(1, heads, tokens, dim, dtype=torch.bfloat16) for _ in range(2))
scores = torch.randn(1, heads, tokens)
budgets = [tokens * 15 // 100] * heads
small = [t[:, :, :4096].clone() for t in (k, v, scores)]

def run(k, v, scores, budgets):
    if sys.argv[1] == "evict":
        return lkv_ext.evict(k, v, scores, budgets)
    if sys.argv[1] == "evict_":
        return lkv_ext.evict_(k, v, scores, budgets)
    if sys.argv[1] == "out":
        return lkv_ext.evict(k, v, scores, budgets, out=out)
    return lkv_ext.select(scores, budgets)

out = lkv_ext.evict(k, v, scores, budgets) if sys.argv[1] == "out" else None
if out is None:
    run(*small, [600] * heads)
before = peak(reset=True)
result = run(k, v, scores, budgets)
made = [result.positions] if sys.argv[1] != "evict" else [result.k, result.v, result.positions]
kept = 0 if out is not None else sum(t.nbytes for t in made)
print(peak() - before, kept, k.nbytes + v.nbytes)
"""


@pytest.mark.parametrize("op", ["evict", "evict_", "select", "out"])
def test_scratch(op: str) -> None:
    """At most 2 % of the cache beside what is returned; in place nothing of the size of K or V."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", MEASURE, op]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown, returned, cache = map(int, result.stdout.split())
    assert grown <= returned + cache * 2 // 100, f"{grown - returned} bytes of scratch for a cache of {cache}"
