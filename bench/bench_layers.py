"""evict_layers: all layers in one call, beside one call per layer."""

from __future__ import annotations

import contenders
import pytest
import rivals
import torch
from bench_evict import MODES, evict, evict_warm
from conftest import Bench
from shapes import Inputs, Shape, make_inputs

import lkv_ext

WHOLE_MODEL = 32  # layers
RESULTS = 8  # of rivals, at the same time in memory


def race(bench: Bench, mode: str, shape: Shape, count: int) -> None:
    """`count` layers of one shape."""
    one = make_inputs(shape, bench.device)
    layers = [Inputs(shape, one.k.clone(), one.v.clone(), one.scores.clone()) for _ in range(count)]
    ks, vs, scores = ([getattr(layer, name) for layer in layers] for name in ("k", "v", "scores"))
    budgets = one.budgets.repeat(count, 1)  # [N, H]
    joint = lkv_ext.evict_layers(ks, vs, scores, budgets)
    warm = mode == "warm"
    singles = [(evict_warm if warm else evict)(layer) for layer in layers]
    compositions = [(rivals.best_out if warm else rivals.best)(layer) for layer in layers]
    others = {
        "memcpy": (rivals.copy_warm if warm else rivals.clone)([joint.k, joint.v]),
        "evict per layer": lambda: [call() for call in singles],
        "best out=" if warm else "best": lambda: [call() for call in compositions],
    }
    one_out = lkv_ext.evict(one.k, one.v, one.scores, one.budgets)
    others |= bench.admit(lambda: contenders.for_layers(layers, [one_out.k, one_out.v]))
    out = joint if warm else None

    def subject() -> lkv_ext.RaggedKV:
        return lkv_ext.evict_layers(ks, vs, scores, budgets, out=out)

    bench.time(f"evict_layers {count}", mode, shape, subject, others, count * shape.moved_bytes)


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
    needed = WHOLE_MODEL * (shape.cache_bytes + 2 * RESULTS * shape.output_bytes)
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    race(bench, mode, shape, WHOLE_MODEL)
