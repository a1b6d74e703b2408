"""Moves the rows that positions name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def gather(rows: Sequence[Tensor], positions: Tensor, offsets: Sequence[int]) -> Tensor:
    """Row `positions[j]` of segment r for every j in `[offsets[r], offsets[r + 1])`; zeros where there is no such row.

    Args:
        rows: of each segment, `[L, ...]`.
        positions: `[total]`.
        offsets: `[R + 1]`, where the span of each segment begins.

    Returns:
        `[total, ...]`. Differentiable.
    """
    moved = []
    for source, (begin, end) in zip(rows, pairwise(offsets), strict=True):
        chosen = positions[begin:end].long()
        inside = (chosen >= 0) & (chosen < source.shape[0])
        padded = torch.cat(
            [source, torch.zeros_like(source[:1]) if len(source) else source.new_zeros(1, *source.shape[1:])]
        )
        moved.append(padded[torch.where(inside, chosen, source.shape[0])])
    tail = positions.numel() - offsets[-1]
    moved.append(rows[0].new_zeros(tail, *rows[0].shape[1:]))
    return torch.cat(moved)
