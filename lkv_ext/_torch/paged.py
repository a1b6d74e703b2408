"""evict_paged_: eviction inside the pages of an engine, through its block tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.options import Options, back_of
from lkv_ext._common.sizes import Segments
from lkv_ext._torch import derivatives, fake
from lkv_ext._torch.ints import Ints, Plan
from lkv_ext._torch.library import ops
from lkv_ext._torch.request import Arguments, Request, make_request, request_for
from lkv_ext.ragged import PagedIndex


def evict_paged_(
    pools: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    scores: Tensor | Sequence[Tensor],
    budgets: Ints | Plan,
    tables: Tensor,
    lengths: Ints | None = None,
    *,
    sink: int = 0,
    window: int = 0,
    max_budget: int | None = None,
    to: str = "front",
    check: bool = False,
) -> PagedIndex:
    """`evict_` in pools of pages: the kept rows of every head move inside the pages that its sequence has already.

    Token `t` of sequence `b` lies in row `t % page` of page `tables[b, t // page]`. A page belongs to one sequence, as
    it is written: pages that several share, for a common prefix, must not be in the tables.

    Args:
        pools: K, V and whatever moves with them, each `[P, H, page, ...]`, or, where every head has a table of its own,
            `[P, page, ...]`; written. Any strides, contiguous after the page axis; `lkv_ext.layout` has the views for
            the pools of engines. Any dtypes; P and page, a power of two, are the same in all. Or, for all layers in one
            launch, a sequence of one pool per layer for each.
        scores: `[B, H, L]` over the tokens of each sequence, float32, float16 or bfloat16, any strides; higher is kept.
            L is at most what a table holds. Or one tensor per layer, or `[N, B, H, L]`.
        budgets: rows to keep per head: an int, a sequence or an integer tensor `[H]` or `[B, H]` (for layers `[N, H]`
            or `[N, B, H]`), on the host or on the device, or a `plan`.
        tables: page ids int32 or int64, `[B, M]` where the heads share a table, or `[B, H, M]`; all layers share them.
            What is behind the pages that `lengths` needs is not read.
        lengths: tokens of each sequence, `[B]` or `[B, H]`, host or device. Default: L.
        sink: as in `evict`.
        window: as in `evict`.
        max_budget: as in `evict`.
        to: "front": the kept rows of a head become its tokens `[0, n)`, and the last pages are free. "back": of `m`
            tokens and a budget of `n`, `drop = floor((m - n) / page) * page` are dropped, the others, the best by
            score, become tokens `[drop, m)`, and the first `drop / page` pages are free: the engine shifts its table
            and keeps positions and slots of new tokens.
        check: reads the tables and raises ValueError where a page that is used is not one of the pool, or is used
            twice. Synchronises. Without it a row of such a page is not moved, or moves twice, inside the pool.

    Returns:
        `PagedIndex`: where the kept rows were, how many there are, and the pages that are free, on the device.

    Raises:
        ValueError, TypeError: as `evict_`, before anything is written; also for lengths of the host beyond L.
    """
    names: list[str] = []
    try:
        stacked = not isinstance(scores, Tensor) or scores.dim() == 4
        ranking: list[Tensor] = list(scores) if stacked else [scores]  # type: ignore[list-item]
        payload, names = _flatten(pools, len(ranking) if stacked else None)
        derivatives.refuse(payload, "an eviction in place has no derivative")
        page = _page_size(payload, tables)
        back = page if to == "back" else back_of(to, 1)
        options = (sink, window, "packed", None, max_budget, 0, 1, back)
        if stacked:
            segments = _segments(ranking)
            request = request_for(segments, None, budgets, lengths, None, Options(*options))
        else:
            request = make_request(ranking[0], None, budgets, lengths, None, options)
        _check_lengths(request)
        if check:
            _check_tables(request, tables, payload[0].shape[0], page)
        result = ops.evict_paged_(payload, [s.detach() for s in ranking], tables, *request.arguments)
        positions, kept, cu_seqlens, overflow, free_pages = result
        if stacked and len(ranking) == 1:  # the ops know no layer axis for one layer
            kept = kept[None]
        cut = overflow if request.counted else None
        return PagedIndex(positions, kept, cu_seqlens, request.max_length, cut, free_pages=free_pages)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("evict_paged_", error, names, given=locals())


def _flatten(pools: Sequence[Any], layers: int | None) -> tuple[list[Tensor], list[str]]:
    """The pools of one layer, or of all, payload-major; and their names."""
    lists = [not isinstance(kind, Tensor) for kind in pools]
    if layers is None:
        if any(lists):
            raise ValueError(
                "expected one tensor for each of pools, as scores are of one layer, got a sequence of them"
            )
        return list(pools), [f"pools[{i}]" for i in range(len(pools))]
    counts = [len(kind) if many else 1 for kind, many in zip(pools, lists, strict=True)]
    if layers == 0 or not all(lists) or any(count != layers for count in counts):
        raise ValueError(f"expected one pool per layer in every sequence of pools, got {counts} for {layers} scores")
    named = [(t, f"pools[{i}][{n}]") for i, kind in enumerate(pools) for n, t in enumerate(kind)]
    return [t for t, _ in named], [name for _, name in named]


def _page_size(payload: Sequence[Tensor], tables: Tensor) -> int:
    """Rows of a page; 1 where the op will refuse the pool."""
    if not payload:
        raise ValueError("expected at least one pool in pools, got none")
    axis = 1 if tables.dim() == 3 else 2
    return max(1, payload[0].shape[axis]) if payload[0].dim() > axis else 1


def _segments(scores: list[Tensor]) -> Segments:
    if any(s.dim() != 3 for s in scores):
        raise ValueError(f"expected scores of shape [B, H, L] per layer, got {[list(s.shape) for s in scores]}")
    layers, (batch, heads) = len(scores), scores[0].shape[:2]
    tokens = [s.shape[2] for s in scores]
    same = all(count == tokens[0] for count in tokens)
    limits = tokens[:1] if same else [count for count in tokens for _ in range(batch * heads)]
    return Segments(layers, batch, heads, limits, stacked=True)


def _check_lengths(request: Request) -> None:
    lengths = () if request.plain else getattr(request.arguments, "lengths", None) or ()
    longer = request.segments.too_long(lengths) if lengths else None
    if longer is not None:
        raise ValueError(f"expected lengths of at most L = {max(request.segments.limits)} as scores have, got {longer}")


def _check_tables(request: Request, tables: Tensor, pages: int, page: int) -> None:
    segments, given = request.segments, Arguments(*request.arguments)
    shape = segments.layers, segments.batch, segments.heads
    most = max(segments.limits)
    lengths = torch.tensor(segments.spread_sequences(given.lengths or segments.limits), device=tables.device)
    if given.lengths_tensor is not None:
        lengths = given.lengths_tensor.clamp(0, most).expand(shape)
    lengths = lengths.view(shape).amax(0)
    used = lengths if tables.dim() == 3 else lengths.amax(1)
    ids = tables[torch.arange(tables.shape[-1], device=tables.device) * page < used[..., None]]
    wrong = ids[(ids < 0) | (ids >= pages)]
    if wrong.numel() > 0:
        raise ValueError(f"expected tables of page ids in [0, {pages}), got {int(wrong[0])}")
    once, counts = ids.unique(return_counts=True)
    if once.numel() != ids.numel():
        raise ValueError(f"expected tables that use every page once, got page {int(once[counts.argmax()])} more often")


@torch.library.register_fake("lkv_ext::evict_paged_")
def fake_evict_paged_(
    pools: list[Tensor], scores: list[Tensor], tables: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    given = Arguments(*args, **kwargs)
    fake.check_arguments(pools, scores, given)
    fake.check_devices(scores[0].device, {"tables": tables})
    index = fake.index(scores, len(scores), given)
    none = scores[0].new_empty([0], dtype=torch.int32)
    free_pages = scores[0].new_empty(tables.shape[:-1], dtype=torch.int32)
    return *index[:3], index[3] if given.count_overflow else none, free_pages
