"""What the host must know of packed rows that come from elsewhere, and what must be true of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lkv_ext._arguments import MOST


class Facts(NamedTuple):
    """Of rows in rooms.

    Attributes:
        first, end: where the first room begins, and the last one ends.
        tail: how many of the last tokens every room has, as its last rows in use.
        longest: rows in use of any room.
        slack: rows that every room has left; 2**31 - 1 where there is no room.
        last_position: the highest of rows in use, -1 where there are none.
    """

    first: int
    end: int
    tail: int
    longest: int
    slack: int
    last_position: int


def read(parts: dict[str, Tensor], align: int, seen: int) -> Facts:
    """Reads no row that is not there, whatever the values; synchronises on CUDA, once.

    Args:
        parts: positions `[T]`, lengths `[B, H]` and cu_seqlens `[B * H + 1]`, int32, of one cache.

    Raises:
        ValueError: unless the rooms lie one behind the other in T rows, on multiples of `align`, and hold their rows,
            which have positions in `[0, seen)`.
    """
    if align < 1:
        raise ValueError(f"expected align >= 1, got {align}")
    positions, used, offsets = parts["positions"], parts["lengths"].flatten().long(), parts["cu_seqlens"].long()
    rows, spans = torch.arange(positions.numel(), device=positions.device), offsets.diff()
    ends = [offsets[0], offsets[-1], (offsets % align).max()]
    if used.numel():
        ends += [spans.min(), used.min(), used.max(), (spans - used).min()]
    if used.numel() and rows.numel():
        row_set = torch.searchsorted(offsets[1:], rows, right=True).clamp_(max=used.numel() - 1)
        place = rows - offsets[row_set]
        in_use = (place >= 0) & (place < used[row_set])
        behind, tokens = (used[row_set] - place)[in_use], positions[in_use].long()  # 1: the last row of its room
        if tokens.numel():
            recent = torch.where(seen - tokens == behind, MOST, behind - 1).min()
            ends += [torch.where(tokens < 0, tokens, 0).sum(), tokens.max(), recent]
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
    return Facts(first, end, min(shortest, recent), longest, slack, last)
