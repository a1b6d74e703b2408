"""evict_paged_: eviction inside the pages of an engine, through its block tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.options import Options, any_order_of, back_of
from lkv_ext._common.paging import Paging, check_companions, paging, table_name
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
    companions: Sequence[Tensor] | Sequence[Sequence[Tensor]] = (),
    companion_tables: Sequence[Tensor] = (),
    to: str = "front",
    order: str = "ascending",
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
        companions: more pools that move along, as `pools`, each with a table and pages of its own: scales, scores,
            positions. What lies in the pages of K and V, too, is one more of `pools`.
        companion_tables: one for each of `companions`, as `tables`.
        to: "front": the kept rows of a head become its tokens `[0, n)`, and the last pages are free. "back": of `m`
            tokens and a budget of `n`, `drop = floor((m - n) / page) * page` are dropped, the others, the best by
            score, become tokens `[drop, m)`, and the first `drop / page` pages are free: the engine shifts its table
            and keeps positions and slots of new tokens. With companions, `page` is the largest one of all.
        order: "ascending", or "any": as in `evict_`.
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
        layers = len(ranking) if stacked else None
        payload, names = _flatten(pools, "pools", layers)
        check_companions(companions, companion_tables)
        more, more_names = _flatten(companions, "companions", layers)
        payload, names = payload + more, names + more_names
        every = [tables, *companion_tables]
        derivatives.refuse(payload, "an eviction in place has no derivative")
        sizes = paging(payload[:: max(layers or 1, 1)], every, layers or 1)
        back = sizes.largest if to == "back" else back_of(to, 1)
        options = (sink, window, "packed", None, max_budget, 0, 1, back, any_order_of(order))
        if stacked:
            segments = _segments(ranking)
            request = request_for(segments, None, budgets, lengths, None, Options(*options))
        else:
            request = make_request(ranking[0], None, budgets, lengths, None, options)
        _check_lengths(request)
        if check:
            _check_tables(request, every, payload[:: layers or 1], sizes)
        result = ops.evict_paged_(payload, [s.detach() for s in ranking], every, *request.arguments)
        positions, kept, cu_seqlens, overflow, free = result
        if stacked and len(ranking) == 1:  # the ops know no layer axis for one layer
            kept = kept[None]
        cut = overflow if request.counted else None
        free_pages, *others = _split(free, every)
        return PagedIndex(
            *(positions, kept, cu_seqlens, request.max_length, cut),
            free_pages=free_pages,
            companion_free_pages=tuple(others),
            row_bytes=sizes.row_bytes,
            page_bytes=sizes.page_bytes,
        )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("evict_paged_", error, names, given=locals())


def _flatten(pools: Sequence[Any], name: str, layers: int | None) -> tuple[list[Tensor], list[str]]:
    """The pools of one layer, or of all, payload-major; and their names."""
    lists = [not isinstance(kind, Tensor) for kind in pools]
    if layers is None:
        if any(lists):
            raise ValueError(
                f"expected one tensor for each of {name}, as scores are of one layer, got a sequence of them"
            )
        return list(pools), [f"{name}[{i}]" for i in range(len(pools))]
    counts = [len(kind) if many else 1 for kind, many in zip(pools, lists, strict=True)]
    if layers == 0 or not all(lists) or any(count != layers for count in counts):
        raise ValueError(f"expected one pool per layer in every sequence of {name}, got {counts} for {layers} scores")
    named = [(t, f"{name}[{i}][{n}]") for i, kind in enumerate(pools) for n, t in enumerate(kind)]
    return [t for t, _ in named], [name for _, name in named]


def _split(free: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """The counts of all tables, table by table."""
    counts = [table.shape[:-1] for table in tables]
    parts = free.split([shape.numel() for shape in counts])
    return [part.view(shape) for part, shape in zip(parts, counts, strict=True)]


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


def _check_tables(request: Request, tables: Sequence[Tensor], kinds: Sequence[Tensor], sizes: Paging) -> None:
    segments, given = request.segments, Arguments(*request.arguments)
    shape = segments.layers, segments.batch, segments.heads
    most = max(segments.limits)
    lengths = torch.tensor(segments.spread_sequences(given.lengths or segments.limits), device=tables[0].device)
    if given.lengths_tensor is not None:
        lengths = given.lengths_tensor.clamp(0, most).expand(shape)
    lengths = lengths.view(shape).amax(0)
    for i, table in enumerate(tables):
        pages = kinds[sizes.table.index(i)].shape[0]
        used = lengths if table.dim() == 3 else lengths.amax(1)
        ids = table[torch.arange(table.shape[-1], device=table.device) * sizes.pages[i] < used[..., None]]
        wrong, name = ids[(ids < 0) | (ids >= pages)], table_name(i)
        if wrong.numel() > 0:
            raise ValueError(f"expected {name} of page ids in [0, {pages}), got {int(wrong[0])}")
        once, counts = ids.unique(return_counts=True)
        if once.numel() != ids.numel():
            twice = int(once[counts.argmax()])
            raise ValueError(f"expected {name} that use every page once, got page {twice} more often")


@torch.library.register_fake("lkv_ext::evict_paged_")
def fake_evict_paged_(
    pools: list[Tensor], scores: list[Tensor], tables: list[Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    given = Arguments(*args, **kwargs)
    fake.check_arguments(pools, scores, given)
    fake.check_devices(scores[0].device, {table_name(i): table for i, table in enumerate(tables)})
    index = fake.index(scores, len(scores), given)
    none = scores[0].new_empty([0], dtype=torch.int32)
    free_pages = scores[0].new_empty([sum(table.shape[:-1].numel() for table in tables)], dtype=torch.int32)
    return *index[:3], index[3] if given.count_overflow else none, free_pages
