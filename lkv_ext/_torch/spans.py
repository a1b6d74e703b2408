"""Index arithmetic of packed rows, and what the host must know of such rows that come from elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lkv_ext._common.options import MOST


def padded(rows: Tensor, cu_seqlens: Tensor, batch: int, columns: int) -> Tensor:
    """`[T, ...]` as `[B, H, columns, ...]`, every span from its beginning; behind its rows there is any content."""
    steps = torch.arange(columns, device=rows.device)
    index = cu_seqlens[:-1].view(batch, (cu_seqlens.numel() - 1) // max(batch, 1), 1) + steps
    return rows[index.clamp_(max=max(rows.shape[0] - 1, 0))]


def packed(scores: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """`[B, H, C]` as `[T]` with T = total, the inverse of `padded`; slack takes any content."""
    columns = scores.shape[2]
    if columns == 0 or scores.numel() == 0:
        return scores.new_zeros(total)
    rows = torch.arange(total, device=scores.device)
    segment = torch.searchsorted(cu_seqlens[1:], rows.int(), right=True).clamp_(max=cu_seqlens.numel() - 2)
    column = (rows - cu_seqlens[segment]).clamp_(0, columns - 1)  # below 0 in front of the first span
    return scores.reshape(-1)[segment * columns + column]


def rows_of(cu_seqlens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of the spans of `segments`, one after the other, and their cu_seqlens; synchronises on CUDA."""
    begins = cu_seqlens[:-1].long()[segments]
    spans = cu_seqlens.diff().long()[segments]
    ends = spans.cumsum(0)
    total = int(ends[-1]) if ends.numel() else 0
    rows = (begins - ends + spans).repeat_interleave(spans, output_size=total)
    rows += torch.arange(total, device=cu_seqlens.device)
    return rows, torch.cat([ends.new_zeros(1), ends]).int()


class Facts(NamedTuple):
    """What the host knows of the rows in their spans.

    Attributes:
        first: where the first span begins.
        end: where the last span ends.
        tail: how many of the last tokens every span has, as its last rows in use.
        longest: rows in use of any span.
        slack: free rows that every span has; 2**31 - 1 where there is no span.
    """

    first: int
    end: int
    tail: int
    longest: int
    slack: int


def read(parts: dict[str, Tensor], align: int, seen: int) -> Facts:
    """Checks the index of a cache. Reads in bounds whatever the values are; synchronises on CUDA, once.

    Args:
        parts: positions `[T]`, lengths `[B, H]` and cu_seqlens `[B * H + 1]`, int32, of one cache.

    Raises:
        ValueError: unless the spans lie one after the other in T rows, on multiples of `align`, none shorter than its
            segment, and rows in use have positions in `[0, seen)`.
    """
    if align < 1:
        raise ValueError(f"expected align >= 1, got {align}")
    positions, used, offsets = parts["positions"], parts["lengths"].flatten().long(), parts["cu_seqlens"].long()
    rows, spans = torch.arange(positions.numel(), device=positions.device), offsets.diff()
    ends = [offsets[0], offsets[-1], (offsets % align).max()]
    if used.numel():
        ends += [spans.min(), used.min(), used.max(), (spans - used).min()]
    if used.numel() and rows.numel():
        segment = torch.searchsorted(offsets[1:], rows, right=True).clamp_(max=used.numel() - 1)
        place = rows - offsets[segment]
        in_use = (place >= 0) & (place < used[segment])
        behind, tokens = (used[segment] - place)[in_use], positions[in_use].long()  # 1: the last row of its span
        if tokens.numel():
            in_place = torch.where(seen - tokens == behind, MOST, behind - 1).min()
            ends += [torch.where(tokens < 0, tokens, 0).sum(), tokens.max(), in_place]
    first, end, misplaced, *sizes = torch.stack(ends).tolist()
    narrowest, shortest, longest, slack, *places = sizes or (0, seen, 0, MOST)
    negative, last, recent = places or (0, -1, MOST)
    if narrowest < 0 or first < 0 or end > positions.numel():
        raise ValueError(
            f"expected cu_seqlens that rise from at least 0 to at most T = {positions.numel()}, got others"
        )
    if misplaced:
        raise ValueError(f"expected cu_seqlens that are multiples of align = {align}, got others")
    if shortest < 0 or slack < 0:
        raise ValueError("expected lengths of at least 0 and at most the rows between cu_seqlens, got others")
    if negative or last >= seen:
        raise ValueError(f"expected positions of rows in use in [0, seen) = [0, {seen}), got others")
    return Facts(first, end, min(shortest, recent), longest, slack)
