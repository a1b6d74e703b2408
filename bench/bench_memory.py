"""Scratch: what a call allocates beside its result, over the bytes of the input cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Bench
from results import Result
from shapes import LENGTHS, Shape


@pytest.mark.parametrize("length", LENGTHS[1::2])
@pytest.mark.parametrize("op", ["evict", "evict_"])
def test_scratch(bench: Bench, op: str, length: int) -> None:
    shape = Shape(length)
    command = [sys.executable, str(Path(__file__).with_name("peak.py")), op, str(length), bench.device]
    peak = int(bench.once(lambda: subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    result = Result(f"{op} scratch", "", str(shape), share=peak / shape.cache_bytes, length=length)
    bench.report(result)
