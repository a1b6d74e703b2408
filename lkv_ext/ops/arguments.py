"""From the arguments of the public functions to those of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lkv_ext._arguments import Options, check_options, integer_shapes, ragged_heads, ragged_limits, shape_of
from lkv_ext._sizes import RowSets, size_output
from lkv_ext.ops.ints import Held, Ints, Plan, hold, split
from lkv_ext.ops.modes import traced

Known = int | tuple[int, ...] | Held


def find_row_sets(
    tensor: Tensor, cu_seqlens: Tensor | None, budgets: Ints | Plan, lengths: Ints | None
) -> tuple[RowSets, Ints | Plan, Ints | None]:
    """The row sets of one tensor `[B, H, L, ...]` or, ragged, `[T, ...]`.

    Ragged tensors have no B and H of their own: these come from the shape of lengths or budgets, `[B, H]`, `[B]` and
    `[H]` (`[N, B, H]` counts as `[N * B, H]` and is returned as such), else B = 1.
    """
    if cu_seqlens is None:
        if tensor.dim() < 3:
            raise ValueError(f"expected scores of shape [B, H, L], got {list(tensor.shape)}")
        batch, heads, tokens = tensor.shape[:3]
        return RowSets(1, batch, heads, (tokens,)), budgets, lengths
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or tensor.dim() < 1:
        raise ValueError(f"expected cu_seqlens of shape [B * H + 1], got {list(cu_seqlens.shape)}")
    count, tokens = cu_seqlens.numel() - 1, tensor.shape[0]
    lengths, budgets = (t.flatten(0, 1) if isinstance(t, Tensor) and t.dim() == 3 else t for t in (lengths, budgets))
    of_budgets = budgets.budgets_tensor if isinstance(budgets, Plan) else budgets
    batch, heads = ragged_heads(count, shape_of(of_budgets), shape_of(lengths))
    if not cu_seqlens.is_cpu or traced(cu_seqlens):
        return RowSets(1, batch, heads, (tokens,), shared=True), budgets, lengths
    return RowSets(1, batch, heads, ragged_limits(cu_seqlens.tolist(), tokens)), budgets, lengths


@dataclass(slots=True)
class Request:
    """The arguments of an op after its tensors, and what the caller wants to know of the result."""

    row_sets: RowSets
    arguments: tuple
    plain: bool  # the arguments are budgets and total alone
    max_length: int
    counted: bool  # overflow is counted on the device
    reserve: int
    align: int


def request(
    tensor: Tensor,
    cu_seqlens: Tensor | None,
    budgets: Ints | Plan,
    lengths: Ints | None,
    starts: Ints | None,
    options: tuple,
) -> Request:
    """Checks the integers of a call on the row sets of `tensor`, and sizes its output.

    Args:
        options: the fields of `Options`; a plain tuple, which costs less.
    """
    eager = not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    if eager and cu_seqlens is None and type(tensor) is Tensor:
        known = budgets if type(budgets) is int else hold(budgets)
        many = None if lengths is None else hold(lengths)
        first = None if starts is None else hold(starts)
        if known is not None and (many is None) is (lengths is None) and (first is None) is (starts is None):
            try:
                return _remembered(tensor.shape, known, many, first, *options)
            except TypeError:
                pass  # what no memo can hold, or is wrong: told apart below
    row_sets, budgets, lengths = find_row_sets(tensor, cu_seqlens, budgets, lengths)
    return request_for(row_sets, cu_seqlens, budgets, lengths, starts, Options(*options))


@lru_cache(maxsize=1024, typed=True)  # 1.0 and True are equal to 1, and refused
def _remembered(shape: torch.Size, budgets: Known, lengths: Known | None, starts: Known | None, *options) -> Request:
    """Engines evict with the same sizes over and over: at decode time this memo is most of what the wrapper saves."""
    if len(shape) < 3:
        raise ValueError(f"expected scores of shape [B, H, L], got {list(shape)}")
    if any(isinstance(option, Tensor) for option in options):
        raise TypeError("the value of a tensor may change, and the memo would not know")
    row_sets = RowSets(1, shape[0], shape[1], (shape[2],))
    return request_for(row_sets, None, budgets, lengths, starts, Options(*options))


def request_for(
    row_sets: RowSets,
    cu_seqlens: Tensor | None,
    budgets: Ints | Plan,
    lengths: Ints | None,
    starts: Ints | None,
    options: Options,
) -> Request:
    """`request` for row sets that are known; lays out the arguments that all ops share."""
    sink, window, layout, capacity, max_budget, reserve, align = check_options(options)
    if cu_seqlens is not None and starts is not None:
        raise ValueError("expected no starts with cu_seqlens: ragged rows begin at their offsets")
    layers, batch, heads = row_sets.layers, row_sets.batch, row_sets.heads
    per_head, per_sequence = integer_shapes(row_sets)
    if isinstance(budgets, Plan):
        if lengths is not None:
            raise ValueError("expected no lengths beside a plan, which has its own, got both")
        budget_list, budget_tensor = budgets.read("budgets", per_head)
        length_list, length_tensor = budgets.read("lengths", per_sequence)
    else:
        budget_list, budget_tensor = split(budgets, "budgets", per_head)
        length_list, length_tensor = split(lengths, "lengths", per_sequence)
        if budget_tensor is not None and capacity is None and max_budget is None:
            budget_list, budget_tensor = _read(budget_tensor), None
    start_list, start_tensor = split(starts, "starts", per_sequence)
    known = bool(budget_list) or budget_tensor is None

    # [N, H] is the same in every sequence, [B] the same for every head: right-aligned, as the ops broadcast.
    if row_sets.stacked and len(budget_list) == layers * heads != row_sets.count:
        rows = [budget_list[n * heads : (n + 1) * heads] for n in range(layers)]
        budget_list = [x for row in rows for _ in range(batch) for x in row]
    if row_sets.stacked and budget_tensor is not None and budget_tensor.dim() == 2:
        budget_tensor = budget_tensor[:, None]
    length_tensor, start_tensor = (
        t[:, None] if t is not None and t.dim() == 1 else t for t in (length_tensor, start_tensor)
    )

    size = size_output(
        row_sets,
        budget_list if known else None,
        length_list,
        start_list,
        layout=layout,
        capacity=capacity,
        max_budget=max_budget,
        reserve=reserve,
        align=align,
    )
    counted = (
        not known
        or row_sets.shared
        or any(
            tensor is not None and not values
            for values, tensor in ((length_list, length_tensor), (start_list, start_tensor))
        )
    )
    given = (budget_list, size.total)
    special = (
        size.padded,
        counted,
        cu_seqlens,
        *((0, 0) if cu_seqlens is None else (batch, heads)),  # dense tensors tell these themselves
        budget_tensor,
        length_list or None,
        length_tensor,
        start_list or None,
        start_tensor,
        sink,
        window,
        -1 if max_budget is None else max_budget,
        reserve,
        align,
    )
    plain = cu_seqlens is budget_tensor is length_tensor is start_tensor is None and special == _DEFAULTS
    return Request(row_sets, given if plain else given + special, plain, size.max_length, counted, reserve, align)


# Of the op schemas, after budgets and total (csrc/torch/arguments.h).
_DEFAULTS = (-1, False, None, 0, 0, None, None, None, None, None, 0, 0, -1, 0, 1)


def _read(budgets: Tensor) -> list[int]:
    """The one synchronisation of a call: device budgets without a bound."""
    if traced(budgets) or (budgets.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise ValueError(
            "expected capacity or max_budget with budgets in a tensor under torch.compile, tracing or graph capture"
        )
    return budgets.flatten().tolist()


def check_rows(rows: Sequence[Tensor], buffers: Sequence[Tensor], names: Sequence[str], batch: int, heads: int) -> None:
    """Refuses new rows `[B, H, n, ...]`, k and v first, that do not fit the buffers `[T, ...]` of a cache."""
    if len(rows) != len(buffers):
        raise ValueError(f"expected {len(buffers) - 2} companions, got {len(rows) - 2}")
    for row, buffer, name in zip(rows, buffers, names, strict=True):
        expected = (batch, heads, rows[0].shape[2] if rows[0].dim() > 2 else 0, *buffer.shape[1:])
        if tuple(row.shape) != expected:
            raise ValueError(f"expected {name} of shape [B, H, n, ...] = {list(expected)}, got {list(row.shape)}")
        if row.dtype != buffer.dtype:
            raise TypeError(f"expected {name} of dtype {buffer.dtype}, got {row.dtype}")
        if row.device != buffer.device:
            raise ValueError(f"expected {name} on {buffer.device}, got {row.device}")
        if torch.is_grad_enabled() and (row.requires_grad or buffer.requires_grad):
            raise ValueError(f"expected {name} that requires no gradient: a cache has none")
