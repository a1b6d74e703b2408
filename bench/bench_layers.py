"""evict_layers: all layers in one call, beside one call per layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import rivals
import rivals_torch as pytorch
import torch
from conftest import MODES, Bench, each
from inputs import Inputs, make_inputs
from shapes import Shape

import lkv_ext

RESULTS = 8  # of rivals, at the same time in memory


def race(bench: Bench, mode: str, shape: Shape) -> None:
    one = make_inputs(replace(shape, layers=1), bench.device)
    layers = [Inputs(one.shape, one.k.clone(), one.v.clone(), one.scores.clone()) for _ in range(shape.layers)]
    ks, vs, scores = ([getattr(layer, name) for layer in layers] for name in ("k", "v", "scores"))
    subject = partial(lkv_ext.evict_layers, ks, vs, scores, one.budgets.repeat(shape.layers, 1))
    joint, alone = subject(), one.evict()
    if mode == "warm":
        subject, singles = partial(subject, out=joint), [layer.evict_warm() for layer in layers]
        memcpy, name, best = pytorch.copy_warm, "best out=", pytorch.best_out
    else:
        singles, memcpy, name, best = [layer.evict for layer in layers], pytorch.clone, "best", pytorch.best
    others = {
        "memcpy": memcpy([joint.k, joint.v]),
        "evict per layer": lambda: [call() for call in singles],
        name: rivals.in_turn(best)(layers),
    }

    def makers() -> dict[str, rivals.Maker]:
        return {name: rivals.in_turn(make) for name, make in rivals.of_evict(one.shape).items()}

    others |= bench.admit(makers, layers, rivals.keeps(shape, [alone.k, alone.v] * shape.layers))
    bench.time(f"evict_layers {shape.layers}", mode, shape, subject, others, shape.moved_bytes)


@each("shape", Shape(1024, layers=16), Shape(4096, layers=16))
@each("mode", *MODES)
def test_layers(bench: Bench, mode: str, shape: Shape) -> None:
    race(bench, mode, shape)


@each("shape", *(Shape(length, layers=32) for length in (4096, 32768, 131072)))
@each("mode", "graph")
def test_whole_model(bench: Bench, mode: str, shape: Shape) -> None:
    """What a GPU is given: up to 17 GB of cache."""
    # Beside the cache, every rival's graph holds its result and as much again.
    needed = shape.cache_bytes + 2 * RESULTS * shape.output_bytes
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    race(bench, mode, shape)
