"""select beside torch.topk: the positions alone, without moving a row."""

from __future__ import annotations

import contenders
import pytest
import rivals
import torch
from conftest import Bench
from shapes import LENGTHS, Shape, make_inputs
from torch import Tensor

import lkv_ext


def flat_positions(index: lkv_ext.RaggedIndex, length: int) -> Tensor:
    """`row * length + position`."""
    counts = index.lengths.flatten()
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
    return (index.positions + rows * length).to(torch.int32)


def race(bench: Bench, shape: Shape) -> None:
    inputs = make_inputs(shape, bench.device)
    budgets = inputs.budgets
    if shape.skewed:
        others = {"loop": rivals.topk_loop(inputs)}
    else:
        others = {
            "topk": rivals.topk(inputs),
            "topk unsorted": rivals.topk(inputs, sorted=False),
            "unsorted, then sort": rivals.topk_positions(inputs),
        }
    others = {"memcpy": rivals.clone([inputs.scores]), **others}
    expected = flat_positions(lkv_ext.select(inputs.scores, budgets), shape.length)
    others |= bench.admit(lambda: contenders.for_select(inputs, expected))
    moved = shape.score_bytes + 4 * shape.kept
    bench.time("select", bench.sweep, shape, lambda: lkv_ext.select(inputs.scores, budgets), others, moved)


@pytest.mark.parametrize("length", LENGTHS)
def test_length(bench: Bench, length: int) -> None:
    race(bench, Shape(length))


@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 32), (8, 8)])
def test_heads_and_batch(bench: Bench, batch: int, heads: int) -> None:
    race(bench, Shape(32768, heads=heads, batch=batch, dim=8))


@pytest.mark.parametrize("retention", [0.05, 0.5])
def test_retention(bench: Bench, retention: float) -> None:
    race(bench, Shape(32768, retention=retention))


@pytest.mark.parametrize("score_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_score_dtype(bench: Bench, score_dtype: torch.dtype) -> None:
    race(bench, Shape(32768, score_dtype=score_dtype))


@pytest.mark.parametrize("length", [8192, 131072])
def test_skewed_budgets(bench: Bench, length: int) -> None:
    race(bench, Shape(length, skewed=True))
