"""From the arguments of lkv_ext.numpy to those of the extension."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from lkv_ext import _C
from lkv_ext._common.options import (
    Options,
    check_options,
    host_ints,
    integer,
    integer_shapes,
    ragged_heads,
    ragged_limits,
    shape_of,
    whole,
)
from lkv_ext._common.paging import Paging, table_name
from lkv_ext._common.sizes import Segments, size_output

Ints = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray


def make_request(
    payload: list[np.ndarray],
    names: list[str],
    scores: np.ndarray,
    cu_seqlens: np.ndarray | None,
    budgets: Ints,
    lengths: Ints | None,
    starts: Ints | None,
    options: Options,
    threads: int | None,
) -> tuple[_C.Request, int]:
    """The request of an op and a bound for its longest segment, after the checks that the extension cannot make."""
    for array, name in zip(payload, names, strict=True):
        check_array(array, name)
    check_array(scores, "scores", read=True)
    if scores.dtype not in (np.float32, np.float16, np.uint16):
        raise TypeError(f"expected scores of dtype float32, float16 or uint16 (bfloat16), got {scores.dtype}")
    for array, name in zip(payload, names, strict=True):
        if name in ("k", "v") and array.ndim != (4 if cu_seqlens is None else 2):
            form = "[B, H, L, D]" if cu_seqlens is None else "[T, D]"
            why = "without cu_seqlens rows are dense" if cu_seqlens is None else "with cu_seqlens rows are ragged"
            raise ValueError(f"expected {name} of shape {form}, got {list(array.shape)}: {why}")
    options = check_options(options)
    segments = _segments(payload[0] if payload else scores, cu_seqlens, budgets, lengths, starts)
    per_head, per_sequence = integer_shapes(segments)
    integers: dict[str, Sequence[int]] = {
        "budgets": host_ints(budgets, "budgets", per_head),
        "lengths": () if lengths is None else host_ints(lengths, "lengths", per_sequence),
        "starts": () if starts is None else host_ints(starts, "starts", per_sequence),
    }
    sink, window, layout, capacity, max_budget, reserve, align, back, any_order = options
    size = size_output(
        segments,
        integers["budgets"],
        integers["lengths"],
        integers["starts"],
        layout=layout,
        capacity=capacity,
        max_budget=max_budget,
        reserve=reserve,
        align=align,
        back=back,
    )
    request = _C.Request(
        threads=thread_count(threads),
        budgets=integers["budgets"],
        lengths=integers["lengths"],
        starts=integers["starts"],
        total=size.total,
        padded=size.padded,
        cu_seqlens=cu_seqlens,
        batch=segments.batch,
        heads=segments.heads,
        sink=sink,
        window=window,
        max_budget=-1 if max_budget is None else max_budget,
        reserve=reserve,
        align=align,
        back=back,
        any_order=any_order,
    )
    return request, size.max_length


def _segments(
    array: np.ndarray, cu_seqlens: np.ndarray | None, budgets: Ints, lengths: Ints | None, starts: Ints | None
) -> Segments:
    if cu_seqlens is None:
        if array.ndim < 3:
            raise ValueError(f"expected scores of shape [B, H, L], got {list(array.shape)}")
        batch, heads, tokens = array.shape[:3]
        return Segments(1, batch, heads, [tokens])
    if starts is not None:
        raise ValueError("expected no starts with cu_seqlens: ragged rows begin at their offsets")
    check_array(cu_seqlens, "cu_seqlens", read=True)
    if cu_seqlens.ndim != 1 or cu_seqlens.size < 1 or array.ndim < 1:
        raise ValueError(f"expected cu_seqlens of shape [B * H + 1], got {list(cu_seqlens.shape)}")
    batch, heads = ragged_heads(cu_seqlens.size - 1, shape_of(budgets), shape_of(lengths))
    return Segments(1, batch, heads, ragged_limits(cu_seqlens.tolist(), array.shape[0]))


def check_array(array: object, name: str, *, read: bool = False) -> None:
    """`read`: its elements are read or written as numbers, not only moved."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"expected {name} as a NumPy array, got {type(array).__name__}")
    if array.dtype.hasobject:
        raise TypeError(f"expected {name} of a dtype without Python objects, got {array.dtype}")
    if read and not array.flags.aligned:
        raise ValueError(f"expected {name} aligned to its dtype, got an unaligned array")


def thread_count(threads: int | None) -> int:
    if threads is None:
        given = os.environ.get("LKV_NUM_THREADS")
        if given is None:
            return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not given.isdecimal() or int(given) < 1:
            raise ValueError(f"expected LKV_NUM_THREADS of at least 1, got {given!r}")
        return int(given)
    if integer(threads, "threads") < 1:
        raise ValueError(f"expected threads of at least 1, got {threads}")
    return whole(threads, "threads")


def per_head(lengths: Ints) -> np.ndarray:
    """`[B, 1]` of lengths `[B]`, which hold for every head; `[B, H]` as they are."""
    given = np.asarray(lengths)
    return given[:, None] if given.ndim == 1 else given


def check_tables(valid: np.ndarray, tables: list[np.ndarray], pools: list[np.ndarray], sizes: Paging) -> None:
    """Raises ValueError for ids outside of their pool, and for pages that the tokens `valid` `[B, H]` use twice."""
    for i, table in enumerate(tables):
        pages = pools[sizes.table.index(i)].shape[0]
        used = valid if table.ndim == 3 else valid.max(1)
        ids = table[np.arange(table.shape[-1]) * sizes.pages[i] < used[..., None]]
        wrong = ids[(ids < 0) | (ids >= pages)]
        if wrong.size > 0:
            raise ValueError(f"expected {table_name(i)} of page ids in [0, {pages}), got {wrong[0]}")
        once, counts = np.unique(ids, return_counts=True)
        if once.size != ids.size:
            raise ValueError(
                f"expected {table_name(i)} that use every page once, got page {once[counts.argmax()]} more often"
            )
