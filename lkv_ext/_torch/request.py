"""From the arguments of the public functions to those that select and the evictions share."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lkv_ext._common.options import Options, check_options, integer_shapes, ragged_heads, ragged_limits, shape_of
from lkv_ext._common.sizes import Segments, size_output
from lkv_ext._torch.ints import HostInts, Ints, Plan, hashable, split
from lkv_ext._torch.library import ops
from lkv_ext._torch.modes import traced

Known = int | tuple[int, ...] | HostInts

# The arguments that the ops share, by name. csrc/host/arguments.h declares them, and the schema has them from there.
_declared = ops.select.default._schema.arguments[1:]
_DEFAULTS = tuple(argument.default_value for argument in _declared if argument.has_default_value())
_named: Any = namedtuple  # a type checker cannot read the schema
Arguments: Any = _named("Arguments", [argument.name for argument in _declared], defaults=_DEFAULTS)


def find_segments(
    tensor: Tensor, cu_seqlens: Tensor | None, budgets: Ints | Plan, lengths: Ints | None
) -> tuple[Segments, Ints | Plan, Ints | None]:
    """The segments of one tensor `[B, H, L, ...]` or, ragged, `[T, ...]`.

    Ragged tensors have no B and H of their own: these come from the shape of lengths or budgets, `[B, H]`, `[B]` and
    `[H]` (`[N, B, H]` counts as `[N * B, H]` and is returned as such), otherwise B = 1.
    """
    if cu_seqlens is None:
        if tensor.dim() < 3:
            raise ValueError(f"expected scores of shape [B, H, L], got {list(tensor.shape)}")
        batch, heads, tokens = tensor.shape[:3]
        return Segments(1, batch, heads, (tokens,)), budgets, lengths
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or tensor.dim() < 1:
        raise ValueError(f"expected cu_seqlens of shape [B * H + 1], got {list(cu_seqlens.shape)}")
    count, tokens = cu_seqlens.numel() - 1, tensor.shape[0]
    if isinstance(lengths, Tensor) and lengths.dim() == 3:
        lengths = lengths.flatten(0, 1)
    if isinstance(budgets, Tensor) and budgets.dim() == 3:
        budgets = budgets.flatten(0, 1)
    of_budgets = budgets.budgets_tensor if isinstance(budgets, Plan) else budgets
    batch, heads = ragged_heads(count, shape_of(of_budgets), shape_of(lengths))
    if not cu_seqlens.is_cpu or traced(cu_seqlens):
        return Segments(1, batch, heads, (tokens,), shared=True), budgets, lengths
    return Segments(1, batch, heads, ragged_limits(cu_seqlens.tolist(), tokens)), budgets, lengths


@dataclass(slots=True)
class Request:
    """The arguments of an op after its tensors, and what the caller needs to know of the result."""

    segments: Segments
    arguments: Sequence[Any]  # Arguments, or budgets and total alone
    plain: bool  # the arguments are budgets and total alone: all others have their defaults
    max_length: int
    counted: bool  # overflow is counted on the device
    reserve: int
    align: int


def make_request(
    tensor: Tensor,
    cu_seqlens: Tensor | None,
    budgets: Ints | Plan,
    lengths: Ints | None,
    starts: Ints | None,
    options: tuple[Any, ...],
) -> Request:
    """Checks the integers of a call on the segments of `tensor`, and sizes its output.

    Args:
        options: the fields of `Options`; a plain tuple, which costs less.
    """
    eager = not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    if eager and cu_seqlens is None and type(tensor) is Tensor:
        known = budgets if type(budgets) is int else hashable(budgets)
        many = None if lengths is None else hashable(lengths)
        first = None if starts is None else hashable(starts)
        if known is not None and (many is None) is (lengths is None) and (first is None) is (starts is None):
            try:
                return _cached(tensor.shape, known, many, first, *options)
            except TypeError:
                pass  # not hashable, or wrong: the full check below decides
    segments, budgets, lengths = find_segments(tensor, cu_seqlens, budgets, lengths)
    return request_for(segments, cu_seqlens, budgets, lengths, starts, Options(*options))


@lru_cache(maxsize=1024, typed=True)  # 1.0 and True are equal to 1, and refused
def _cached(shape: torch.Size, budgets: Known, lengths: Known | None, starts: Known | None, *options: Any) -> Request:
    """Engines evict with the same sizes again and again: at decode time this memo saves most of the wrapper's cost."""
    if len(shape) < 3:
        raise ValueError(f"expected scores of shape [B, H, L], got {list(shape)}")
    if any(isinstance(option, Tensor) for option in options):
        raise TypeError("the value of a tensor may change, and the memo would not notice")
    segments = Segments(1, shape[0], shape[1], (shape[2],))
    return request_for(segments, None, budgets, lengths, starts, Options(*options))


def request_for(
    segments: Segments,
    cu_seqlens: Tensor | None,
    budgets: Ints | Plan,
    lengths: Ints | None,
    starts: Ints | None,
    options: Options,
) -> Request:
    """`make_request` for segments that are known."""
    sink, window, layout, capacity, max_budget, reserve, align, back, any_order = check_options(options)
    if cu_seqlens is not None and starts is not None:
        raise ValueError("expected no starts with cu_seqlens: ragged rows begin at their offsets")
    layers, batch, heads = segments.layers, segments.batch, segments.heads
    per_head, per_sequence = integer_shapes(segments)
    budget_list: Sequence[int]
    length_list: Sequence[int]
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
    if segments.stacked and len(budget_list) == layers * heads != segments.count:
        rows = [budget_list[n * heads : (n + 1) * heads] for n in range(layers)]
        budget_list = [x for row in rows for _ in range(batch) for x in row]
    if segments.stacked and budget_tensor is not None and budget_tensor.dim() == 2:
        budget_tensor = budget_tensor[:, None]
    length_tensor, start_tensor = (
        t[:, None] if t is not None and t.dim() == 1 else t for t in (length_tensor, start_tensor)
    )

    counted = (
        not known
        or segments.shared
        or any(
            tensor is not None and not values
            for values, tensor in ((length_list, length_tensor), (start_list, start_tensor))
        )
    )
    size = size_output(
        segments,
        budget_list if known else None,
        length_list,
        start_list,
        layout=layout,
        capacity=capacity,
        max_budget=max_budget,
        reserve=reserve,
        align=align,
        back=back,
        exact=not counted,
    )
    arguments = Arguments(
        budgets=budget_list,
        total=size.total,
        padded=size.padded,
        count_overflow=counted,
        cu_seqlens=cu_seqlens,
        batch=0 if cu_seqlens is None else batch,  # dense tensors have these in their shapes
        heads=0 if cu_seqlens is None else heads,
        budgets_tensor=budget_tensor,
        lengths=length_list or None,
        lengths_tensor=length_tensor,
        starts=start_list or None,
        starts_tensor=start_tensor,
        sink=sink,
        window=window,
        max_budget=-1 if max_budget is None else max_budget,
        reserve=reserve,
        align=align,
        back=back,
        any_order=any_order,
    )
    plain = cu_seqlens is budget_tensor is length_tensor is start_tensor is None and arguments[2:] == _DEFAULTS
    return Request(segments, arguments[:2] if plain else arguments, plain, size.max_length, counted, reserve, align)


def _read(budgets: Tensor) -> list[int]:
    """The one synchronisation of a call: device budgets without a bound."""
    if traced(budgets) or (budgets.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise ValueError(
            "expected capacity or max_budget with budgets in a tensor under torch.compile, tracing or graph capture"
        )
    return budgets.flatten().tolist()
