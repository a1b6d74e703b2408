"""Linear in L and in kept rows: one call beside four calls of a quarter of the work, in the same rounds; scratch.

The four share no memory that the one does not touch too, so that caches favour neither side.
"""

from __future__ import annotations

import peak
import torch
from conftest import Bench, each
from inputs import Inputs, make_inputs
from results import Result
from shapes import Shape


def race(bench: Bench, whole: Inputs, quarters: list[Inputs], name: str) -> None:
    calls = [quarter.evict_warm() for quarter in quarters]
    others = {name: lambda: [call() for call in calls]}
    bench.time("evict scaling", "warm", whole.shape, whole.evict_warm(), others, whole.shape.moved_bytes)


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


@each("shape", Shape(8192), Shape(131072))
@each("op", "evict", "evict_")
def test_scratch(bench: Bench, op: str, shape: Shape) -> None:
    """What a call allocates beside its result, over the bytes of the input cache."""
    bytes_ = bench.once(lambda: peak.of_a_child("peak.py", op, shape.length, bench.device))
    share = bytes_ / shape.cache_bytes
    bench.report(Result(f"{op} scratch", "", str(shape), share=share, length=shape.length))
