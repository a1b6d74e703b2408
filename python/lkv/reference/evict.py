"""evict and its relatives, as they are specified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lkv.reference.gather import gather
from lkv.reference.select import select
from lkv.reference.spans import Spans, spans


@dataclass
class Evicted:
    """What `lkv_ext.evict` returns, under the same names; `tensors` are k, v and companions."""

    tensors: list[Tensor]
    positions: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    overflow: int
    free_pages: Tensor | None = None  # of evict_paged_
    companion_free_pages: tuple[Tensor, ...] = ()


def _segments(tensor: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """`[B, H, L, ...]` or ragged `[T, ...]` as one view `[L, ...]` per segment."""
    if cu_seqlens is None:
        return [head for sequence in tensor for head in sequence]
    offsets = cu_seqlens.tolist()
    return [tensor[begin:end] for begin, end in pairwise(offsets)]


def _valid_ranges(
    rows: Sequence[Tensor], starts: Sequence[int] | None, lengths: Sequence[int] | None
) -> list[tuple[int, int]]:
    ranges = []
    for i, row in enumerate(rows):
        limit = row.shape[0]
        start = max(0, min(starts[i], limit)) if starts is not None else 0
        length = max(0, min(lengths[i], limit - start)) if lengths is not None else limit - start
        ranges.append((start, length))
    return ranges


def evict(
    tensors: Sequence[Tensor],
    scores: Tensor,
    budgets: Tensor,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    layout: str = "packed",
    capacity: int | None = None,
    max_budget: int | None = None,
    reserve: int = 0,
    align: int = 1,
    page: int = 1,
    total: int | None = None,
) -> Evicted:
    """`lkv_ext.evict` of k, v and companions, `tensors`, in one list.

    Args:
        budgets, lengths, starts: integers `[B, H]`.
        page: what is dropped of a segment is a multiple of so many rows.
        total: rows of the output where that is a bound rather than the exact number.
    """
    return evict_layers(
        [[t] for t in tensors],
        [scores],
        budgets[None],
        lengths=None if lengths is None else lengths[None],
        starts=None if starts is None else starts[None],
        cu_seqlens=cu_seqlens,
        sink=sink,
        window=window,
        layout=layout,
        capacity=capacity,
        max_budget=max_budget,
        reserve=reserve,
        align=align,
        page=page,
        total=total,
    )


def evict_layers(
    tensors: Sequence[Sequence[Tensor]],
    scores: Sequence[Tensor],
    budgets: Tensor,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    total: int | None = None,
    **span_options: Any,
) -> Evicted:
    """`lkv_ext.evict_layers`: `tensors[p][n]` is payload p of layer n; budgets, lengths, starts `[N, B, H]`.

    `lengths` of the result are `[B, H]` for one layer and `[N, B, H]` for more.
    """
    rows = [[row for t in layers for row in _segments(t, cu_seqlens)] for layers in tensors]
    score_rows = [row for s in scores for row in _segments(s, cu_seqlens)]
    ranges = _valid_ranges(score_rows, _listed(starts), _listed(lengths))
    where: Spans = spans(budgets.flatten().tolist(), [length for _, length in ranges], total=total, **span_options)
    positions = select(score_rows, ranges, where, sink=sink, window=window)
    moved = [gather(payload, positions, where.offsets) for payload in rows]

    device = scores[0].device
    shape = budgets.shape[1:] if len(scores) == 1 else budgets.shape
    if where.padded is not None:
        moved = [t.view(*shape, where.padded, *t.shape[1:]) for t in moved]
        positions = positions.view(*shape, where.padded)
    return Evicted(
        moved,
        positions,
        torch.tensor(where.kept, dtype=torch.int32, device=device).view(shape),
        torch.tensor(where.offsets, dtype=torch.int32, device=device),
        where.cut,
    )


def evict_(
    tensors: Sequence[Tensor],
    scores: Tensor,
    budgets: Tensor,
    *,
    to: str = "front",
    page: int = 1,
    order: str = "ascending",
    **options: Any,
) -> Evicted:
    """`lkv_ext.evict_`: kept rows move to the front of their segment, or to the back of its valid range."""
    result = evict(tensors, scores, budgets, page=page, **options)
    rows = _segments(scores, options.get("cu_seqlens"))
    ranges = _valid_ranges(rows, *(_listed(options.get(name)) for name in ("starts", "lengths")))
    offsets = result.cu_seqlens.tolist()
    for i, span in enumerate(pairwise(offsets)):
        keep = span[1] - span[0]
        first = 0 if to == "front" else sum(ranges[i]) - keep
        positions = result.positions[slice(*span)]
        if order == "any":
            positions.copy_(fill_holes(positions, first, to))
        for tensor in tensors:
            row = _segments(tensor, options.get("cu_seqlens"))[i]
            row[first : first + keep] = row[positions.long()]
    return result


def fill_holes(positions: Tensor, first: int, to: str) -> Tensor:
    """The positions of the rows that slots `first` and on get in any order: those that lie there stay, and the others,
    which all lie behind (`to="back"`: before) them, fill the holes, the farthest the first one (the last one)."""
    kept, slots = positions.tolist(), range(first, first + positions.numel())
    others = [position for position in kept if position not in slots]
    holes = [slot for slot in slots if slot not in set(kept)]
    fillers = dict(zip(holes, reversed(others), strict=True))
    return torch.tensor([fillers.get(slot, slot) for slot in slots], dtype=positions.dtype, device=positions.device)


def evict_paged_(
    pools: Sequence[Tensor],
    scores: Tensor,
    budgets: Tensor,
    tables: Tensor,
    lengths: Tensor | None = None,
    *,
    companions: Sequence[Tensor] = (),
    companion_tables: Sequence[Tensor] = (),
    to: str = "front",
    order: str = "ascending",
    **options: Any,
) -> Evicted:
    """`lkv_ext.evict_paged_` of one layer.

    Args:
        pools: `[P, H, page, ...]` with tables `[B, M]`, or `[P, page, ...]` with tables `[B, H, M]`.
        budgets, lengths: integers `[B, H]`.
    """
    batch, heads, tokens = scores.shape
    placed = [(pool, tables) for pool in pools] + list(zip(companions, companion_tables, strict=True))
    pages = [pool.shape[1 if table.dim() == 3 else 2] for pool, table in placed]
    valid = torch.full((batch, heads), tokens) if lengths is None else lengths.clamp(0, tokens)
    result = evict([], scores, budgets, lengths=valid, page=max(pages) if to == "back" else 1, **options)
    offsets = result.cu_seqlens.tolist()
    for b in range(batch):
        for h in range(heads):
            span = slice(*offsets[b * heads + h : b * heads + h + 2])
            keep = span.stop - span.start
            first = 0 if to == "front" else int(valid[b, h]) - keep
            if order == "any":
                result.positions[span] = fill_holes(result.positions[span], first, to)
            positions = result.positions[span].long()
            slots = first + torch.arange(keep, device=scores.device)
            for (pool, table), page in zip(placed, pages, strict=True):
                mine, ids = (pool, table[b, h]) if table.dim() == 3 else (pool[:, h], table[b])
                mine[ids[slots // page].long(), slots % page] = mine[ids[positions // page].long(), positions % page]
    kept = result.lengths.cpu().long()
    free = [_free_pages(valid, kept, pages[0], tables.dim() == 3, to)]
    free += [_free_pages(valid, kept, page, table.dim() == 3, to)
             for (_, table), page in list(zip(placed, pages, strict=True))[len(pools) :]]  # fmt: skip
    result.free_pages, *others = (pages.int().to(scores.device) for pages in free)
    result.companion_free_pages = tuple(others)
    return result


def _free_pages(valid: Tensor, kept: Tensor, page: int, per_head: bool, to: str) -> Tensor:
    """Pages of each table that no head needs any more, `[B]` or `[B, H]`."""
    if to == "back":
        dropped = (valid - kept) // page
        return dropped if per_head else dropped.amin(1)
    used, needed = (-(-(rows if per_head else rows.amax(1)) // page) for rows in (valid, kept))
    return used - needed


def _listed(values: Tensor | None) -> list[int] | None:
    return None if values is None else values.flatten().tolist()
