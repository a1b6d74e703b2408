"""evict_layers: all layers in one call, beside one call per layer."""

from __future__ import annotations

import pytest
import rivals
from bench_evict import moved_bytes
from conftest import Bench
from shapes import Inputs, Shape, make_inputs

import lkv_ext

LAYERS = 16


@pytest.mark.parametrize("length", [1024, 4096])
def test_layers(bench: Bench, length: int) -> None:
    shape = Shape(length)
    one = make_inputs(shape, bench.device)
    layers = [Inputs(shape, one.k.clone(), one.v.clone(), one.scores) for _ in range(LAYERS)]
    ks, vs, scores = ([getattr(layer, name) for layer in layers] for name in ("k", "v", "scores"))
    budgets = shape.budgets
    out = lkv_ext.evict_layers(ks, vs, scores, budgets)
    composition = [rivals.best(layer) for layer in layers]
    others = {
        "memcpy": rivals.clone([out.k, out.v]),
        "evict per layer": lambda: [lkv_ext.evict(x.k, x.v, x.scores, budgets) for x in layers],
        "best": lambda: [call() for call in composition],
    }

    def subject() -> lkv_ext.RaggedKV:
        return lkv_ext.evict_layers(ks, vs, scores, budgets)

    bench.time(f"evict_layers {LAYERS}", "fresh", shape, subject, others, LAYERS * moved_bytes(shape))
