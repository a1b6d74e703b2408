"""Index arithmetic of packed rows: where the rooms of all (sequence, KV head) begin, end, and which pages they are."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(rows: Tensor, cu_seqlens: Tensor, batch: int, columns: int) -> Tensor:
    """`[T, ...]` as `[B, H, columns, ...]`, every room from its beginning; behind its rows there is any content."""
    steps = torch.arange(columns, device=rows.device)
    index = cu_seqlens[:-1].long().view(batch, (cu_seqlens.numel() - 1) // max(batch, 1), 1) + steps
    return rows[index.clamp_(max=max(rows.shape[0] - 1, 0))]


def packed(scores: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """`[B, H, C]` as `[T]` with T = total, the inverse of `padded`; slack takes any content."""
    columns = scores.shape[2]
    if columns == 0 or scores.numel() == 0:
        return scores.new_zeros(total)
    rows = torch.arange(total, device=scores.device)
    row_set = torch.searchsorted(cu_seqlens[1:], rows.int(), right=True).clamp_(max=cu_seqlens.numel() - 2)
    column = (rows - cu_seqlens[row_set]).clamp_(max=columns - 1)
    return scores.reshape(-1)[row_set * columns + column]


def rows_of(cu_seqlens: Tensor, row_sets: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of the rooms `row_sets`, one room behind the other, and the cu_seqlens of that; synchronises on CUDA."""
    begins = cu_seqlens[:-1].long()[row_sets]
    rooms = cu_seqlens.diff().long()[row_sets]
    ends = rooms.cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    rows = (begins - ends + rooms).repeat_interleave(rooms, output_size=total)
    rows += torch.arange(total, device=cu_seqlens.device)
    return rows, torch.cat([ends.new_zeros(1), ends]).int()


def block_table(cu_seqlens: Tensor, align: int, longest: int, total: int) -> Tensor:
    """int32 `[B * H, pages]`: pages of `align` rows of each room in order, enough for `longest` rows, of `total` rows.

    Entries after the last page of a room are valid pages too: readers stop at their lengths.
    """
    pages = -(-longest // align)
    first = cu_seqlens[:-1, None] // align
    steps = torch.arange(pages, dtype=torch.int32, device=first.device)
    return (first + steps).clamp_(max=max(total // align - 1, 0))
