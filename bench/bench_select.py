"""select beside torch.topk: the positions alone, without moving a row."""

from __future__ import annotations

from functools import partial

import rivals
import rivals_torch as pytorch
import torch
from conftest import Bench, each
from inputs import make_inputs
from shapes import LENGTHS, Shape

import lkv_ext


@each(
    "shape",
    *map(Shape, LENGTHS),
    *(Shape(32768, heads, batch, dim=8) for batch, heads in ((1, 1), (1, 32), (8, 8))),
    *(Shape(32768, retention=retention) for retention in (0.05, 0.5)),
    *(Shape(32768, score_dtype=dtype) for dtype in (torch.bfloat16, torch.float16)),
    Shape(8192, skewed=True),
    Shape(131072, skewed=True),
)
def test_select(bench: Bench, shape: Shape) -> None:
    inputs = make_inputs(shape, bench.device)
    scores, budgets = inputs.scores, shape.per_segment
    if shape.skewed:
        others = {"loop": pytorch.topk_loop(inputs)}
    else:
        others = {
            "topk": partial(scores.topk, budgets[0]),
            "topk unsorted": partial(scores.topk, budgets[0], sorted=False),
            "unsorted, then sort": lambda: scores.topk(budgets[0], sorted=False).indices.sort().values,
        }
    subject = partial(lkv_ext.select, scores, inputs.budgets)
    segments = torch.arange(len(budgets)).repeat_interleave(torch.tensor(budgets)).to(bench.device)
    keeps = rivals.keeps(shape, [(subject().positions + segments * shape.length).to(torch.int32)])
    others |= bench.admit(lambda: rivals.of_select(shape), inputs, lambda found: keeps([found.to(torch.int32)]))
    moved = shape.score_bytes + 4 * shape.kept
    bench.time("select", bench.sweep, shape, subject, {"memcpy": pytorch.clone([scores]), **others}, moved)
