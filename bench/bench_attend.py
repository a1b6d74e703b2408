"""Decoding over what an eviction left: attend beside PyTorch's attention, append beside a bare write of its rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import rivals_torch as pytorch
import torch
import torch.nn.functional as F
from conftest import Bench, each
from inputs import make_inputs
from shapes import Shape
from torch import Tensor

import lkv_ext

GROUP = 4  # query heads per KV head


@each(
    "shape",
    Shape(8192, skewed=True),
    Shape(32768, skewed=True),
    Shape(32768),
    Shape(32768, skewed=True, dtype=torch.float32),
)
def test_attend(bench: Bench, shape: Shape) -> None:
    inputs = make_inputs(replace(shape, skewed=False), bench.device)
    # Any bytes make rows that move; to be attended to they must be numbers.
    k, v = (torch.randn(t.shape, device=t.device).to(t.dtype) for t in inputs.payload)
    generator = torch.Generator(bench.device).manual_seed(1)
    sizes = (shape.batch, shape.heads * GROUP, 1, shape.dim)
    q = torch.randn(sizes, generator=generator, device=bench.device).to(shape.dtype)
    kept = lkv_ext.evict(k, v, inputs.scores, shape.budgets, reserve=64)
    padded = lkv_ext.evict(k, v, inputs.scores, shape.budgets, layout="padded")
    mask = (torch.arange(padded.k.shape[2], device=bench.device) < padded.lengths[..., None])[:, :, None]
    # The query heads of a group as queries of their KV head: many times faster here than enable_gqa.
    grouped = q.view(shape.batch, shape.heads, GROUP, shape.dim)
    others = {
        "memcpy": pytorch.copy_warm([kept.k, kept.v]),
        "dense": partial(F.scaled_dot_product_attention, grouped, k, v),
        "padded": partial(F.scaled_dot_product_attention, grouped, padded.k, padded.v, attn_mask=mask),
    }
    torch.testing.assert_close(lkv_ext.attend(q, kept).view_as(grouped), others["padded"](), rtol=0.02, atol=0.02)
    bench.time("attend", "warm", shape, partial(lkv_ext.attend, q, kept), others, shape.output_bytes)


def test_append(bench: Bench) -> None:
    """One token behind 100k kept rows, beside index_copy_ of its rows to places known beforehand."""
    shape = Shape(100_000 // 8, retention=1.0)
    inputs = make_inputs(shape, bench.device)
    # Slack for every round: what is measured is a step, and one step in thousands reallocates.
    kept = lkv_ext.evict(inputs.k, inputs.v, inputs.scores, shape.budgets, reserve=40_000)
    cache = lkv_ext.RaggedCache(kept, shape.length)
    k, v = (t[:, :, :1] for t in inputs.payload)
    ends = kept.cu_seqlens[1:].long() - 1
    fresh = [t.flatten(0, 2) for t in (k, v)]

    def write() -> list[Tensor]:
        return [rows.index_copy_(0, ends, new) for rows, new in zip((cache.k, cache.v), fresh, strict=True)]

    moved = 2 * cache.heads * shape.row_bytes
    bench.time("append", "warm", shape, partial(cache.append, k, v), {"bare write": write}, moved)
