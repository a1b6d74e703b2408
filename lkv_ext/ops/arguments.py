"""From the arguments of the public functions to those of the ops."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lkv_ext._sizes import RowSets, size_output

Ints = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(slots=True)
class Plan:
    """Budgets and lengths on the host and on a device at once; see `plan`."""

    budgets: list[int]
    budgets_tensor: Tensor
    lengths: list[int]
    lengths_tensor: Tensor | None

    def read(self, name: str, shapes: Sequence[Sequence[int]]) -> tuple[list[int], Tensor | None]:
        """The host copy and, where the kernels cannot read that, the device copy of `name`."""
        values, tensor = getattr(self, name), getattr(self, f"{name}_tensor")
        if tensor is not None and tensor.dim() and tuple(tensor.shape) not in shapes:
            raise _wrong_shape(name, shapes, list(tensor.shape))
        return values, None if tensor is None or tensor.is_cpu else tensor


def plan(budgets: Ints, lengths: Ints | None = None, *, device: torch.device | str | None = None) -> Plan:
    """Copies budgets and lengths to `device` once, for many calls of `evict`, `select` and `evict_` with the same ones.

    Pass the plan as `budgets` (and no `lengths`): sizes come from the host copy and are exact, the kernels read the
    device copy, and the call neither synchronises nor uploads them.

    Args:
        budgets: rows to keep per head: an int, a sequence or a tensor of integers `[H]` or `[B, H]`.
        lengths: valid rows, `[B]` or `[B, H]`; default: all.
        device: where the kernels will run; default: the current default device.

    Raises:
        TypeError: where something is not an integer.
    """
    held, budgets_tensor = _both(budgets, "plan: expected budgets", device)
    if lengths is None:
        return Plan(held, budgets_tensor, [], None)
    return Plan(held, budgets_tensor, *_both(lengths, "plan: expected lengths", device))


def _both(values: Ints, what: str, device: torch.device | str | None) -> tuple[list[int], Tensor]:
    tensor = torch.as_tensor(values)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"lkv_ext.{what} of integers, got {tensor.dtype}")
    return tensor.flatten().tolist(), tensor.to(device or torch.get_default_device(), torch.int64)


def split(values: Ints | None, name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[Sequence[int], Tensor | None]:
    """Host integers as a flat list, or a tensor that the host cannot or must not read (then the list is empty)."""
    if values is None:
        return (), None
    if isinstance(values, (int, torch.SymInt)):
        return (values,), None
    if not isinstance(values, Tensor):
        flat, shape = _flatten(values, name)
        if shape not in shapes and shape not in ((), (1,)):
            raise _wrong_shape(name, shapes, shape)
        return flat, None
    if values.dtype not in (torch.int32, torch.int64):
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
            raise TypeError(f"expected {name} of integers, got {values.dtype}")
        values = values.to(torch.int64)
    if values.dim() and tuple(values.shape) not in shapes:
        raise _wrong_shape(name, shapes, values.shape)
    # The tracer cannot read a tensor: there the values of a CPU tensor count as device values.
    if not values.is_cpu or torch.compiler.is_compiling():
        return (), values
    return values.flatten().tolist(), None


def _flatten(values: Sequence, name: str) -> tuple[list[int], tuple[int, ...]]:
    if hasattr(values, "ravel"):  # NumPy
        return _flatten(values.ravel().tolist(), name)[0], tuple(values.shape)
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise TypeError(f"expected {name} as an int, a sequence of ints or a tensor, got {values!r}")
    if len(values) == 0 or not hasattr(values[0], "__len__"):
        if torch.compiler.is_compiling():
            return list(values), (len(values),)
        try:
            return list(map(operator.index, values)), (len(values),)
        except TypeError:
            raise TypeError(f"expected {name} of integers, got {values!r}") from None
    parts = [_flatten(row, name) for row in values]
    if any(shape != parts[0][1] for _, shape in parts):
        raise ValueError(f"expected {name} with rows of one length, got lengths {[len(flat) for flat, _ in parts]}")
    return [x for flat, _ in parts for x in flat], (len(parts), *parts[0][1])


def _wrong_shape(name: str, shapes: Sequence[Sequence[int]], got: Sequence[int]) -> ValueError:
    form = {1: "[H]", 2: "[B, H]", 3: "[N, B, H]"} if name == "budgets" else {1: "[B]", 2: "[B, H]", 3: "[N, B, H]"}
    if name == "budgets" and len(shapes[-1]) == 3:
        form[2] = "[N, H]"
    expected = " or ".join(f"{form[len(shape)]} = {list(shape)}" for shape in shapes)
    return ValueError(f"expected {name} of shape {expected}, got {list(got)}")


class Options(NamedTuple):
    """What is kept and how the output is laid out: the keyword arguments that select and evict share."""

    sink: int
    window: int
    layout: str
    capacity: int | None
    max_budget: int | None
    reserve: int
    align: int


def find_row_sets(
    tensor: Tensor, cu_seqlens: Tensor | None, budgets: Ints | Plan, lengths: Ints | None
) -> tuple[RowSets, Ints | Plan, Ints | None]:
    """The row sets of one tensor `[B, H, L, ...]` or, ragged, `[T, ...]`.

    Ragged tensors have no B and H of their own: these come from the shape of lengths or budgets, `[B, H]`, `[B]` and
    `[H]` (`[N, B, H]` counts as `[N * B, H]` and is returned as such), else B = 1.
    """
    if cu_seqlens is None:
        if tensor.dim() < 3:
            raise ValueError(f"expected a dense tensor of shape [B, H, L, ...], got {list(tensor.shape)}")
        batch, heads, tokens = tensor.shape[:3]
        return RowSets(1, batch, heads, [tokens]), budgets, lengths
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or tensor.dim() < 1:
        raise ValueError(f"expected cu_seqlens of shape [B * H + 1], got {list(cu_seqlens.shape)}")
    count, tokens = cu_seqlens.numel() - 1, tensor.shape[0]
    lengths, budgets = (t.flatten(0, 1) if isinstance(t, Tensor) and t.dim() == 3 else t for t in (lengths, budgets))
    of_lengths, of_budgets = _shape(lengths), _shape(budgets)
    if len(of_lengths) == 2 or len(of_budgets) == 2:
        batch, heads = of_lengths if len(of_lengths) == 2 else of_budgets
    elif of_lengths:
        batch, heads = of_lengths[0], count // max(of_lengths[0], 1)
    else:
        heads = of_budgets[0] if of_budgets else count
        batch = count // max(heads, 1)
    if batch * heads != count:
        raise ValueError(f"expected cu_seqlens of shape [B * H + 1] = [{batch * heads + 1}], got [{count + 1}]")
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return RowSets(1, batch, heads, [tokens], shared=True), budgets, lengths
    begins = [max(0, min(x, tokens)) for x in cu_seqlens.tolist()]
    limits = [max(0, end - begin) for begin, end in zip(begins, begins[1:], strict=False)]
    return RowSets(1, batch, heads, limits), budgets, lengths


def _shape(values: Ints | Plan | None) -> tuple[int, ...]:
    if isinstance(values, Plan):
        values = values.budgets_tensor
    if values is None or isinstance(values, int):
        return ()
    if isinstance(values, Tensor):
        return tuple(values.shape)
    nested = len(values) > 0 and hasattr(values[0], "__len__")
    return (len(values), len(values[0])) if nested else (len(values),)


@dataclass(slots=True)
class Request:
    """The arguments of an op after its tensors, and what the caller wants to know of the result."""

    arguments: tuple
    max_length: int
    counted: bool  # overflow is counted on the device


def request(
    row_sets: RowSets,
    cu_seqlens: Tensor | None,
    budgets: Ints | Plan,
    lengths: Ints | None,
    starts: Ints | None,
    options: Options,
) -> Request:
    """Checks the integers of a call, sizes its output, and lays out the arguments that all ops share."""
    sink, window, layout, capacity, max_budget, reserve, align = options
    if layout not in ("packed", "padded"):
        raise ValueError(f"expected layout 'packed' or 'padded', got {layout!r}")
    if sink < 0 or window < 0 or reserve < 0 or align < 1:
        raise ValueError(
            f"expected sink, window and reserve >= 0 and align >= 1, got {sink}, {window}, {reserve} and {align}"
        )
    if cu_seqlens is not None and starts is not None:
        raise ValueError("expected no starts with cu_seqlens: ragged rows begin at their offsets")
    layers, batch, heads = row_sets.layers, row_sets.batch, row_sets.heads
    if row_sets.stacked:
        per_head = [(layers, heads), (layers, batch, heads)]
        per_sequence = [(batch,), (batch, heads), (layers, batch, heads)]
    else:
        per_head, per_sequence = [(heads,), (batch, heads)], [(batch,), (batch, heads)]
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
    arguments = (
        *((0, 0) if cu_seqlens is None else (batch, heads)),  # dense tensors tell these themselves
        cu_seqlens,
        budget_list,
        budget_tensor,
        length_list or None,
        length_tensor,
        start_list or None,
        start_tensor,
        sink,
        window,
        size.total,
        size.padded,
        -1 if max_budget is None else max_budget,
        reserve,
        align,
        counted,
    )
    return Request(arguments, size.max_length, counted)


def _read(budgets: Tensor) -> list[int]:
    """The one synchronisation of a call: device budgets without a bound."""
    if torch.compiler.is_compiling() or (budgets.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise ValueError(
            "expected capacity or max_budget with budgets in a tensor under torch.compile or graph capture"
        )
    return budgets.flatten().tolist()
