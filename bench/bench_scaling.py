"""Linear in L and in kept rows: one call beside four calls of a quarter of the work, in the same rounds; scratch.

The four share no memory that the one does not touch too, so that caches favour neither side.
"""

from __future__ import annotations

import peak
import pytest
import torch
from bench_evict import evict_warm
from conftest import Bench
from results import Result
from shapes import LENGTHS, Inputs, Shape, make_inputs


def race(bench: Bench, whole: Inputs, quarters: list[Inputs], name: str) -> None:
    calls = [evict_warm(quarter) for quarter in quarters]
    rivals = {name: lambda: [call() for call in calls]}
    bench.time("evict scaling", "warm", whole.shape, evict_warm(whole), rivals, whole.shape.moved_bytes)


def test_linear_in_length(bench: Bench) -> None:
    """The four calls take a quarter of the tokens of the same cache each."""
    whole = make_inputs(Shape(131072), bench.device)
    parts = zip(*(t.chunk(4, dim=2) for t in (whole.k, whole.v, whole.scores)), strict=True)
    race(bench, whole, [Inputs(Shape(32768), *part) for part in parts], "4 x L/4")


def test_linear_in_kept_rows(bench: Bench) -> None:
    """The four calls keep different rows of the same cache."""
    whole = make_inputs(Shape(32768, retention=0.6), bench.device)
    scores = [torch.randn_like(whole.scores) for _ in range(4)]
    shape = Shape(32768, retention=0.15)
    race(bench, whole, [Inputs(shape, whole.k, whole.v, s) for s in scores], "4 x 15%")


@pytest.mark.parametrize("length", LENGTHS[1::2])
@pytest.mark.parametrize("op", ["evict", "evict_"])
def test_scratch(bench: Bench, op: str, length: int) -> None:
    """What a call allocates beside its result, over the bytes of the input cache."""
    shape = Shape(length)
    bytes_ = bench.once(lambda: peak.of_a_child("peak.py", op, length, bench.device))
    bench.report(Result(f"{op} scratch", "", str(shape), share=bytes_ / shape.cache_bytes, length=length))
