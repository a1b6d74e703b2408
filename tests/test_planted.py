"""Rows that mislead the samples of the CPU kernels, on every instruction set that this machine runs."""

from __future__ import annotations

import pytest
from test_isa import run

CHECKS = ("select", "select_long", "evict", "soft_topk", "soft_topk_decided")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_as_the_reference(isa: str, check: str) -> None:
    code = "import sys\nimport lkv_ext\nfrom planted import *\n"
    result = run(isa, f"{code}assert lkv_ext.build_info()['cpu_isa'] == sys.argv[1]\n{check}()", isa)
    if f"LKV_CPU_ISA={isa} is not available here" in result.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert result.returncode == 0, result.stderr
