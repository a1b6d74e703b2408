"""evict_layers: all layers in one call, beside one call per layer."""

from __future__ import annotations

import pytest
import rivals
from bench_evict import MODES, evict, evict_warm, moved_bytes
from conftest import Bench
from shapes import Inputs, Shape, make_inputs

import lkv_ext

LAYERS = 16


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("mode", MODES)
def test_layers(bench: Bench, length: int, mode: str) -> None:
    shape = Shape(length)
    one = make_inputs(shape, bench.device)
    layers = [Inputs(shape, one.k.clone(), one.v.clone(), one.scores) for _ in range(LAYERS)]
    ks, vs, scores = ([getattr(layer, name) for layer in layers] for name in ("k", "v", "scores"))
    joint = lkv_ext.evict_layers(ks, vs, scores, shape.budgets)
    pair = [joint.k, joint.v]
    if mode == "warm":
        out = joint
        memcpy, compositions, name = rivals.copy_warm(pair), [rivals.best_out(layer) for layer in layers], "best out="
        singles = [evict_warm(layer, lkv_ext.evict(layer.k, layer.v, layer.scores, shape.budgets)) for layer in layers]
    else:
        out = None
        memcpy, compositions, name = rivals.clone(pair), [rivals.best(layer) for layer in layers], "best"
        singles = [evict(layer) for layer in layers]
    others = {
        "memcpy": memcpy,
        "evict per layer": lambda: [call() for call in singles],
        name: lambda: [call() for call in compositions],
    }

    def subject() -> lkv_ext.RaggedKV:
        return lkv_ext.evict_layers(ks, vs, scores, shape.budgets, out=out)

    bench.time(f"evict_layers {LAYERS}", mode, shape, subject, others, LAYERS * moved_bytes(shape))
