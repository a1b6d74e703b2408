"""evict_layers: all layers in one call, beside one call per layer."""

from __future__ import annotations

import contenders
import pytest
import rivals
import torch
from bench_evict import MODES, evict, evict_warm, moved_bytes
from conftest import Bench
from shapes import Inputs, Shape, make_inputs

import lkv_ext

WHOLE_MODEL = 32  # layers
ROOM_FOR = 8  # rivals


def race(bench: Bench, mode: str, shape: Shape, count: int) -> None:
    """`count` layers of one shape."""
    one = make_inputs(shape, bench.device)
    layers = [Inputs(shape, one.k.clone(), one.v.clone(), one.scores.clone()) for _ in range(count)]
    ks, vs, scores = ([getattr(layer, name) for layer in layers] for name in ("k", "v", "scores"))
    budgets = one.budgets.repeat(count, 1)  # [N, H]
    joint = lkv_ext.evict_layers(ks, vs, scores, budgets)
    pair = [joint.k, joint.v]
    if mode == "warm":
        out = joint
        memcpy, compositions, name = rivals.copy_warm(pair), [rivals.best_out(layer) for layer in layers], "best out="
        singles = [evict_warm(layer, lkv_ext.evict(layer.k, layer.v, layer.scores, layer.budgets)) for layer in layers]
    else:
        out = None
        memcpy, compositions, name = rivals.clone(pair), [rivals.best(layer) for layer in layers], "best"
        singles = [evict(layer) for layer in layers]
    others = {
        "memcpy": memcpy,
        "evict per layer": lambda: [call() for call in singles],
        name: lambda: [call() for call in compositions],
    }

    one_out = lkv_ext.evict(one.k, one.v, one.scores, one.budgets)
    others |= bench.admit(lambda: contenders.for_layers(layers, [one_out.k, one_out.v]))

    def subject() -> lkv_ext.RaggedKV:
        return lkv_ext.evict_layers(ks, vs, scores, budgets, out=out)

    bench.time(f"evict_layers {count}", mode, shape, subject, others, count * moved_bytes(shape))


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("mode", MODES)
def test_layers(bench: Bench, length: int, mode: str) -> None:
    race(bench, mode, Shape(length), count=16)


@pytest.mark.parametrize("length", [4096, 32768, 131072])
@pytest.mark.parametrize("mode", ["graph"])
def test_whole_model(bench: Bench, length: int, mode: str) -> None:
    """What a GPU is given: up to 17 GB of cache."""
    shape = Shape(length)
    # Beside the cache, every rival's graph holds its result and as much again.
    needed = WHOLE_MODEL * (shape.cache_bytes + 2 * ROOM_FOR * shape.output_bytes)
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    race(bench, mode, shape, WHOLE_MODEL)
