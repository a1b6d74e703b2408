"""Linear in L and in kept rows: one call beside four calls of a quarter of the work, in the same rounds."""

from __future__ import annotations

from bench_evict import evict_warm, moved_bytes
from conftest import Bench
from shapes import Inputs, Shape, make_inputs
from timing import Call

import lkv_ext


def four_times(call: Call) -> Call:
    return lambda: [call() for _ in range(4)]


def warm(inputs: Inputs) -> Call:
    return evict_warm(inputs, lkv_ext.evict(inputs.k, inputs.v, inputs.scores, inputs.shape.budgets))


def race(bench: Bench, whole: Shape, quarter: Shape, name: str) -> None:
    rival = four_times(warm(make_inputs(quarter, bench.device)))
    bench.time(
        "evict scaling", "warm", whole, warm(make_inputs(whole, bench.device)), {name: rival}, moved_bytes(whole)
    )


def test_linear_in_length(bench: Bench) -> None:
    race(bench, Shape(131072), Shape(32768), "4 x L/4")


def test_linear_in_kept_rows(bench: Bench) -> None:
    race(bench, Shape(32768, retention=0.6), Shape(32768, retention=0.15), "4 x 15%")
