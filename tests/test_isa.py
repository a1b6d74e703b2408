"""The CPU kernels of every instruction set this machine runs, forced one at a time in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Sizes around the widths of vectors and the thresholds of the selection, every kind and dtype of scores, odd rows.
PARITY = """
import itertools, sys
import torch
from cases import DTYPES, SCORE_DTYPES, SCORES, bits, check, check_index, expected, place, rows_of, scores_of
from cases import storage_bytes, twins
import lkv_ext

assert lkv_ext.build_info()["cpu_isa"] == sys.argv[1]
tokens = (1, 15, 16, 17, 63, 130, 1023, 2047, 2049, 4100, 9000)
for count, (kind, dtype) in itertools.product(tokens, itertools.product(SCORES, SCORE_DTYPES)):
    scores = place(scores_of(kind, [1, 3, count]).to(dtype), ("contiguous", "tokens_first")[count % 2])
    budgets = [count // 7, count // 2, count - 1]
    check_index(lkv_ext.select(scores, budgets, sink=count % 3), expected([], scores, budgets, sink=count % 3))
for dim, how in itertools.product((1, 2, 3, 4, 5, 8, 12, 16, 31, 33, 64, 65, 100, 129, 200), ("contiguous", "gapped")):
    for dtype in (torch.int8, torch.bfloat16, torch.float32, torch.int64):
        payload = [place(rows_of([2, 2, 60, dim], dtype, i), how) for i in range(2)]
        scores = scores_of("ties", [2, 2, 60])
        want = expected(payload, scores, [7, 40], reserve=1)
        out = lkv_ext.evict(*payload, scores, [7, 40], reserve=1)
        check(out, want)
        check(lkv_ext.evict(*payload, scores, [7, 40], reserve=1, out=out), want)
        mine, theirs = twins(payload), twins(payload)
        lkv_ext.evict_(*mine, scores, [7, 40])
        expected(theirs, scores, [7, 40], in_place=True)
        assert all(torch.equal(storage_bytes(a), storage_bytes(b)) for a, b in zip(mine, theirs))
# Large and warm: non-temporal stores, where rows and their addresses are multiples of 64 bytes.
k, v = rows_of([1, 1, 200_000, 64], torch.bfloat16), rows_of([1, 1, 200_000, 25], torch.float32)
scores = scores_of("normal", [1, 1, 200_000])
out, want = lkv_ext.evict(k, v, scores, 100_000), expected([k, v], -scores, 100_000)
check(lkv_ext.evict(k, v, -scores, 100_000, out=out), want)
out.k = torch.empty(100_001 * 64, dtype=k.dtype)[8 : 8 + 100_000 * 64].view(100_000, 64)
check(lkv_ext.evict(k, v, -scores, 100_000, out=out), want)
"""

# Every 16-bit score there is, and of float32 the neighbours of every border: all NaNs, both zeros, subnormal numbers.
BITS = """
import torch
from cases import check_index, expected, generator
import lkv_ext

def every_budget(bits, dtype, budgets):
    order = torch.randperm(bits.numel(), generator=generator(7))
    scores = bits[order].view(dtype).expand(1, len(budgets), -1)
    check_index(lkv_ext.select(scores, budgets), expected([], scores, budgets))

borders = torch.tensor([0, 0x007fffff, 0x00800000, 0x3f800000, 0x7f7fffff, 0x7f800000, 0x7fc00000, 0x7ffffffe])
bits = (borders[:, None] + torch.tensor([-1, 0, 1])).flatten().clamp_(min=0)
bits = torch.cat([bits, bits - 2**31]).to(torch.int32)
every_budget(bits, torch.float32, list(range(1, bits.numel())))
every_budget(bits.repeat(100), torch.float32, list(range(1, 4800, 307)))
for dtype in (torch.float16, torch.bfloat16):
    every_budget(torch.arange(-(2**15), 2**15, dtype=torch.int16), dtype, list(range(1, 2**16, 9001)))
    every_budget(torch.arange(-(2**15), 2**15, 77, dtype=torch.int16), dtype, list(range(1, 850, 61)))
"""


def run(isa: str, code: str, *arguments: str) -> subprocess.CompletedProcess:
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment = os.environ | {"LKV_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("code", [PARITY, BITS], ids=["parity", "bits"])
def test_parity(isa: str, code: str) -> None:
    result = run(isa, code, isa)
    if f"LKV_CPU_ISA={isa} is not available here" in result.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert result.returncode == 0, result.stderr


def test_unknown() -> None:
    """The error names what there is: whoever has AVX-512 has AVX2 too, and all have the portable kernels."""
    result = run("mmx", "import lkv_ext; lkv_ext.build_info()")
    assert result.returncode != 0 and "LKV_CPU_ISA=mmx is not available here" in result.stderr
    named = re.search(r"\((.*)\)$", result.stderr.strip())[1].split(", ")
    assert named in (["avx512", "avx2", "portable"], ["avx2", "portable"], ["portable"])


def test_unknown_in_an_op() -> None:
    """An error like any other: the process lives."""
    code = """
import torch, lkv_ext
try:
    lkv_ext.select(torch.zeros(1, 1, 9), 4)
except RuntimeError as error:
    assert "LKV_CPU_ISA=mmx is not available here" in str(error), error
else:
    raise AssertionError
"""
    result = run("mmx", code)
    assert result.returncode == 0, result.stderr
