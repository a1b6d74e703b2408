"""The operator on NumPy arrays, for engines without torch: the same kernels, the same semantics, on the CPU.

    out = lkv_ext.numpy.evict(k, v, scores, budgets)

NumPy has no bfloat16: scores of dtype uint16 are bfloat16 by their bits (`.view(numpy.uint16)`). K, V and companions
move as bytes, whatever their dtype. All integers are on the host, so every size is exact. `threads` is how many threads
a call may use; default: LKV_NUM_THREADS of the environment, else the cores that this process may run on. They start and
end with the call, and the result does not depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from lkv_ext import _C
from lkv_ext._common import errors
from lkv_ext._common.options import Options, any_order_of, back_of, whole_pages
from lkv_ext._common.paging import FreedBytes, check_companions, paging, table_name
from lkv_ext._numpy import Ints, check_array, check_tables, make_request, per_head, thread_count

__all__ = ["PagedIndex", "RaggedIndex", "RaggedKV", "evict", "evict_", "evict_paged_", "gather", "select"]


@dataclass(eq=False, slots=True)
class RaggedIndex:
    """Which rows each (sequence, KV head) keeps, and where they go.

    Attributes:
        positions: int32 `[T']` (packed) or `[B, H, C]` (padded): positions in the input segment, -1 in slack;
            ascending, or with `order="any"` by the rows where they are now.
        lengths: int32 `[B, H]`: rows kept.
        cu_seqlens: int32 `[B * H + 1]`: where the span of each segment begins.
        max_length: the longest of `lengths`, or a bound of it where `capacity` cuts.
        overflow: None: sizes are known on the host.
    """

    positions: np.ndarray
    lengths: np.ndarray
    cu_seqlens: np.ndarray
    max_length: int
    overflow: None = None


@dataclass(eq=False, slots=True)
class PagedIndex(FreedBytes, RaggedIndex):
    """What `evict_paged_` has kept and freed.

    Attributes:
        positions, lengths, cu_seqlens, max_length, overflow: as in `RaggedIndex`.
        free_pages, companion_free_pages, row_bytes, page_bytes: as in `lkv_ext.PagedIndex`.
    """

    free_pages: np.ndarray = field(kw_only=True)
    companion_free_pages: tuple[np.ndarray, ...] = field(kw_only=True, default=())
    row_bytes: int = field(kw_only=True, default=0)
    page_bytes: tuple[int, ...] = field(kw_only=True, default=(0,))


@dataclass(eq=False, slots=True)
class RaggedKV:
    """A KV cache in which every (sequence, KV head) has its own length.

    Attributes:
        k: `[T', D]` (packed) or `[B, H, C, D]` (padded); slack rows are zero.
        v: `[T', Dv]` or `[B, H, C, Dv]`; None for caches of one array.
        companions: the companions of the call, `[T', ...]` or `[B, H, C, ...]`; slack is zero.
        positions: as in `RaggedIndex`.
        lengths: as in `RaggedIndex`.
        cu_seqlens: as in `RaggedIndex`.
        max_length: as in `RaggedIndex`.
        overflow: None, as in `RaggedIndex`.
        reserve: slack rows that every span was given.
        align: every span is a multiple of it.
    """

    k: np.ndarray
    v: np.ndarray | None
    companions: tuple[np.ndarray, ...]
    positions: np.ndarray
    lengths: np.ndarray
    cu_seqlens: np.ndarray
    max_length: int
    overflow: None = None
    reserve: int = 0
    align: int = 1

    @property
    def block_table(self) -> np.ndarray | None:
        """int32 `[B * H, pages]`: the pages of each segment, where `align` > 1 is the page size; else None.

        Entries after the last page of a span repeat valid pages: readers stop at `lengths`.
        """
        if self.align == 1:
            return None
        pages = np.arange(-(-(self.max_length + self.reserve) // self.align), dtype=np.int32)
        last = max(self.positions.size // self.align - 1, 0)
        return np.minimum(self.cu_seqlens[:-1, None] // np.int32(self.align) + pages, np.int32(last))

    @property
    def index(self) -> RaggedIndex:
        """The positions without the rows."""
        return RaggedIndex(self.positions, self.lengths, self.cu_seqlens, self.max_length)


def evict(
    k: np.ndarray,
    v: np.ndarray | None,
    scores: np.ndarray,
    budgets: Ints,
    *,
    lengths: Ints | None = None,
    starts: Ints | None = None,
    cu_seqlens: np.ndarray | None = None,
    sink: int = 0,
    window: int = 0,
    layout: str = "packed",
    capacity: int | None = None,
    max_budget: int | None = None,
    reserve: int = 0,
    align: int = 1,
    companions: Sequence[np.ndarray] = (),
    out: RaggedKV | None = None,
    threads: int | None = None,
) -> RaggedKV:
    """Keeps the `budgets` best rows of every (sequence, KV head) and moves their K and V together.

    The same as `lkv_ext.evict`: with `n = clamp(budget, 0, length)`, the first `min(sink, n)` and the last
    `min(window, rest)` valid tokens of a segment stay, and of those between the best by score, ties to the lower
    position; NaN ranks below -inf, -0 equals +0. They come out in ascending position, bitwise as they were.

    Args:
        k: dense `[B, H, L, D]`, any strides with contiguous rows; or ragged `[T, D]` with `cu_seqlens`. Any dtype
            without Python objects. H counts KV heads.
        v: `[B, H, L, Dv]` or `[T, Dv]`, as `k`; None for caches of one array.
        scores: `[B, H, L]` or, ragged, `[T]`; float32, float16 or uint16 (bfloat16), any strides; higher is kept.
        budgets: rows to keep per head: an int or integers `[H]` or `[B, H]`.
        lengths: valid rows of each segment, `[B]` or `[B, H]`; of ragged input the rows in use of each span. Default:
            all.
        starts: where the valid range `[starts, starts + lengths)` of a dense segment begins, `[B]` or `[B, H]`.
            Default: 0.
        cu_seqlens: int32 `[B * H + 1]` of ragged input: where the span of each segment begins.
        sink: the first `sink` valid tokens are kept before any other, inside the budget.
        window: the last `window` valid tokens are kept before any but those of `sink`, inside the budget.
        layout: "packed", `[T', D]`, all heads after each other in (b, h) order; or "padded", `[B, H, C, D]`.
        capacity: upper bound of T' (packed) or C (padded); heads that do not fit are cut.
        max_budget: upper bound for any one head.
        reserve: slack rows behind every head's rows.
        align: every span is its rows plus `reserve`, rounded up to `align`.
        companions: arrays `[B, H, L, ...]` (ragged `[T, ...]`) of any dtype that move by the same positions.
        out: the result of an earlier call of the same sizes: its memory is overwritten and it is returned again.
        threads: how many threads the call may use.

    Returns:
        The kept rows as `RaggedKV`. Slack rows are zero, in `positions` -1.

    Raises:
        ValueError, TypeError: for a wrong shape, dtype, stride or overlap, before anything is written.
    """
    options = Options(sink, window, layout, capacity, max_budget, reserve, align)
    names: list[str] = []
    try:
        payload = [k, *companions] if v is None else [k, v, *companions]
        names = _names(v is not None, len(companions))
        request, max_length = make_request(
            payload, names, scores, cu_seqlens, budgets, lengths, starts, options, threads
        )
        if out is None:
            moved, index = _C.evict(payload, scores, request)
        else:
            moved, index = _arrays_of(out)
            _C.evict_out(moved, index, payload, scores, request)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("numpy.evict", error, names, given=locals())
    if out is not None:
        out.max_length, out.reserve, out.align = max_length, reserve, align
        return out
    rest = 1 if v is None else 2
    return RaggedKV(
        moved[0],
        None if v is None else moved[1],
        tuple(moved[rest:]),
        *(index.positions, index.lengths, index.cu_seqlens, max_length, None),
        reserve=reserve,
        align=align,
    )


def evict_(
    k: np.ndarray,
    v: np.ndarray | None,
    scores: np.ndarray,
    budgets: Ints,
    *,
    lengths: Ints | None = None,
    starts: Ints | None = None,
    cu_seqlens: np.ndarray | None = None,
    sink: int = 0,
    window: int = 0,
    max_budget: int | None = None,
    companions: Sequence[np.ndarray] = (),
    to: str = "front",
    page: int = 1,
    order: str = "ascending",
    threads: int | None = None,
) -> RaggedIndex:
    """`evict` in place: the kept rows of each segment move to rows `[0, n)` of its own buffer, the rest is untouched.

    Allocates indices only. Arguments and errors are those of `evict`, `to`, `page` and `order` those of
    `lkv_ext.evict_`. k, v and companions are written: they must be writeable, and no two of their elements may share
    memory, but interleaved views of one buffer may lie beside each other.

    Returns:
        `RaggedIndex`: where the kept rows were, and how many there are.

    Raises:
        ValueError, TypeError: as `evict`, also for overlapping or read-only memory.
    """
    names: list[str] = []
    try:
        options = Options(sink, window, "packed", None, max_budget, 0, 1, back_of(to, page), any_order_of(order))
        payload = [k, *companions] if v is None else [k, v, *companions]
        names = _names(v is not None, len(companions))
        request, max_length = make_request(
            payload, names, scores, cu_seqlens, budgets, lengths, starts, options, threads
        )
        return _ragged_index(_C.evict_(payload, scores, request), max_length)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("numpy.evict_", error, names, given=locals())


def evict_paged_(
    pools: Sequence[np.ndarray],
    scores: np.ndarray,
    budgets: Ints,
    tables: np.ndarray,
    lengths: Ints | None = None,
    *,
    sink: int = 0,
    window: int = 0,
    max_budget: int | None = None,
    companions: Sequence[np.ndarray] = (),
    companion_tables: Sequence[np.ndarray] = (),
    to: str = "front",
    order: str = "ascending",
    check: bool = False,
    threads: int | None = None,
) -> PagedIndex:
    """`evict_` in pools of pages, through tables of page ids: `lkv_ext.evict_paged_` of one layer.

    Args:
        pools: K, V and whatever moves with them, `[P, H, page, ...]`, or, where every head has a table of its own, `[P,
            page, ...]`; written. A page has a power of two of rows.
        scores: `[B, H, L]` over the tokens of each sequence.
        budgets: as in `evict`.
        tables: page ids int32 or int64, `[B, M]` or `[B, H, M]`.
        lengths: tokens of each sequence, `[B]` or `[B, H]`. Default: L.
        sink, window, max_budget: as in `evict`.
        companions, companion_tables, to, order, check: as in `lkv_ext.evict_paged_`.
        threads: how many threads the call may use.

    Returns:
        `PagedIndex`: where the kept rows were, how many there are, and the pages that are free.

    Raises:
        ValueError, TypeError: as `evict_`, before anything is written; also for lengths beyond L.
    """
    names: list[str] = []
    try:
        payload, every = [*pools, *companions], [tables, *companion_tables]
        names = [f"pools[{i}]" for i in range(len(pools))] + [f"companions[{i}]" for i in range(len(companions))]
        check_companions(companions, companion_tables)
        for array, name in zip(payload, names, strict=True):
            check_array(array, name)
        for i, table in enumerate(every):
            check_array(table, table_name(i), read=True)
        sizes = paging(payload, every)
        back = sizes.largest if to == "back" else back_of(to, 1)
        options = Options(sink, window, "packed", None, max_budget, 0, 1, back, any_order_of(order))
        request, max_length = make_request([], [], scores, None, budgets, lengths, None, options, threads)
        valid = np.broadcast_to(scores.shape[2] if lengths is None else per_head(lengths), scores.shape[:2])
        if valid.size > 0 and valid.max() > scores.shape[2]:
            raise ValueError(f"expected lengths of at most L = {scores.shape[2]} as scores have, got {valid.max()}")
        if check:
            check_tables(np.maximum(valid, 0), every, payload, sizes)
        index, free = _C.evict_paged_(payload, scores, every, request)
        counts = [table.shape[:-1] for table in every]
        parts = np.split(free, np.cumsum([prod(shape) for shape in counts])[:-1])
        free_pages, *others = (part.reshape(shape) for part, shape in zip(parts, counts, strict=True))
        return PagedIndex(
            *(index.positions, index.lengths, index.cu_seqlens, max_length),
            free_pages=free_pages,
            companion_free_pages=tuple(others),
            row_bytes=sizes.row_bytes,
            page_bytes=sizes.page_bytes,
        )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("numpy.evict_paged_", error, names, given=locals())


def select(
    scores: np.ndarray,
    budgets: Ints,
    *,
    lengths: Ints | None = None,
    starts: Ints | None = None,
    cu_seqlens: np.ndarray | None = None,
    sink: int = 0,
    window: int = 0,
    layout: str = "packed",
    capacity: int | None = None,
    max_budget: int | None = None,
    reserve: int = 0,
    align: int = 1,
    page: int = 1,
    threads: int | None = None,
) -> RaggedIndex:
    """The positions that `evict` would keep, without moving anything. Arguments and errors are those of `evict`, and
    `page` is that of `lkv_ext.select`.

    Returns:
        `RaggedIndex`: positions, lengths, cu_seqlens and max_length.

    Raises:
        ValueError, TypeError: as `evict`.
    """
    try:
        options = Options(sink, window, layout, capacity, max_budget, reserve, align, whole_pages(page))
        request, max_length = make_request([], [], scores, cu_seqlens, budgets, lengths, starts, options, threads)
        return _ragged_index(_C.select(scores, request), max_length)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("numpy.select", error, given=locals())


def gather(
    arrays: Sequence[np.ndarray],
    index: RaggedIndex,
    *,
    cu_seqlens: np.ndarray | None = None,
    threads: int | None = None,
) -> list[np.ndarray]:
    """Moves the rows that an index names.

    Args:
        arrays: dense `[B, H, L, ...]` or, with `cu_seqlens`, ragged `[T, ...]`; one L for all.
        index: the result of `select` for these segments. A position outside the segment gives a row of zeros.
        cu_seqlens: int32 `[B * H + 1]` of ragged input.
        threads: how many threads the call may use.

    Returns:
        One array for each: `[T', ...]` or, with a padded index, `[B, H, C, ...]`.

    Raises:
        ValueError, TypeError: for a wrong shape, dtype or stride.
    """
    names: list[str] = []
    try:
        moved = list(arrays)
        names = [f"arrays[{i}]" for i in range(len(moved))]
        if not moved:
            return []
        for array, name in zip(moved, names, strict=True):
            check_array(array, name)
        parts = [index.positions, index.lengths, index.cu_seqlens]
        for array, name in zip(parts, ("positions", "lengths", "cu_seqlens"), strict=True):
            check_array(array, f"index.{name}", read=True)
        if cu_seqlens is not None:
            check_array(cu_seqlens, "cu_seqlens", read=True)
        batch, heads = index.lengths.shape
        return _C.gather(moved, _C.Index(*parts), batch, heads, cu_seqlens, thread_count(threads))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("numpy.gather", error, names, given=locals())


def _arrays_of(out: RaggedKV) -> tuple[list[np.ndarray], _C.Index]:
    if not isinstance(out, RaggedKV):
        raise TypeError(f"expected out as a RaggedKV of lkv_ext.numpy, got {type(out).__name__}")
    moved = [out.k, *out.companions] if out.v is None else [out.k, out.v, *out.companions]
    for array, name in zip(moved, _names(out.v is not None, len(out.companions)), strict=True):
        check_array(array, f"out.{name}")
    index = [out.positions, out.lengths, out.cu_seqlens]
    for array, name in zip(index, ("positions", "lengths", "cu_seqlens"), strict=True):
        check_array(array, f"out.{name}", read=True)
    return moved, _C.Index(*index)


def _ragged_index(index: _C.Index, max_length: int) -> RaggedIndex:
    return RaggedIndex(index.positions, index.lengths, index.cu_seqlens, max_length)


def _names(has_v: bool, companions: int) -> list[str]:
    return ["k", *(["v"] if has_v else []), *(f"companions[{i}]" for i in range(companions))]
