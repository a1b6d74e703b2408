"""Positions that are given rather than selected."""

from __future__ import annotations

import torch
from shapes import Shape
from torch import Tensor

import lkv_ext


def runs_of(shape: Shape, run: int, device: str) -> Tensor:
    """Ascending positions `[B, H, n]`, the same number for each: random disjoint runs of `run` rows, the last cut.

    Runs begin at multiples of `run`, so neighbours may join.
    """
    count = shape.per_row[0]
    if run >= count:
        return torch.arange(count, device=device).expand(shape.batch, shape.heads, -1)
    slots, wanted = shape.length // run, -(-count // run)
    generator = torch.Generator(device).manual_seed(run)
    order = torch.rand(shape.batch, shape.heads, slots, generator=generator, device=device)
    first = order.topk(wanted, dim=-1).indices.sort(dim=-1).values * run
    return (first[..., None] + torch.arange(run, device=device)).flatten(-2)[..., :count]


def index_of(positions: Tensor) -> lkv_ext.RaggedIndex:
    """The packed index of positions `[B, H, n]`."""
    batch, heads, count = positions.shape
    rows, device = batch * heads, positions.device
    return lkv_ext.RaggedIndex(
        positions.to(torch.int32).reshape(-1),
        torch.full((batch, heads), count, dtype=torch.int32, device=device),
        torch.arange(0, (rows + 1) * count, count, dtype=torch.int32, device=device),
        count,
    )
