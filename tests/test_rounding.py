"""One row: attention is a copy of it, rounded to the type of the queries. Every 16-bit value there is, and what rounds
to it."""

from __future__ import annotations

import pytest
import torch
from test_isa import run
from torch import Tensor

import lkv_ext

WIDTH = 1000
NEIGHBOURS = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)


def copied(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values through an attention over rows that are alone in their segments."""
    rows = torch.nn.functional.pad(values, (0, -len(values) % WIDTH)).view(-1, WIDTH)
    count = torch.arange(len(rows) + 1, dtype=torch.int32)
    ones = torch.ones(len(rows), 1, dtype=torch.int32)
    kv = lkv_ext.RaggedKV(rows.new_zeros(len(rows), 2), rows, (), count[:-1] * 0, ones, count, 1)
    return lkv_ext.attend(torch.ones(len(rows), 1, 1, 2, dtype=dtype), kv).flatten()[: len(values)]


def check(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0, 1, -1), want.nan_to_num(0, 1, -1))
    assert torch.equal(got.isinf(), want.isinf())


def check_all() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        check(copied(every.view(dtype), torch.float32), every.view(dtype).float())
        check(copied(every.view(dtype), dtype), every.view(dtype))
    between = ((every.int()[:, None] << 16) | NEIGHBOURS).flatten().view(torch.float32)
    check(copied(between, torch.bfloat16), between.bfloat16())
    half = every.view(torch.float16).float()
    half = half[half.isfinite()].sort().values.unique()
    middle = (half[1:] + half[:-1]) / 2
    for values in (half, middle, middle.nextafter(half[1:]), middle.nextafter(half[:-1])):
        check(copied(values, torch.float16), values.half())
    edges = torch.tensor([65503.0, 65519.0, 65519.996, 65520.0, 65536.0, 1e30, torch.inf, torch.nan, 2.0**-25, 1e-10])
    check(copied(torch.cat([edges, -edges]), torch.float16), torch.cat([edges, -edges]).half())


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_one_row(isa: str) -> None:
    result = run(isa, "import test_rounding; test_rounding.check_all()", isa)
    if f"LKV_CPU_ISA={isa} is not available here" in result.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert result.returncode == 0, result.stderr
