"""Integers of the caller: budgets, lengths and starts, on the host, on a device, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from lkv_ext._arguments import host_ints, is_one_of, wrong_shape
from lkv_ext.ops.modes import traced

Ints = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


class Held(NamedTuple):
    """What stood in a tensor on the host, as a memo can compare it."""

    values: tuple[int, ...]
    shape: tuple[int, ...]


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
        if tensor is not None and tensor.dim() and not is_one_of(tuple(tensor.shape), shapes):
            raise wrong_shape(name, shapes, list(tensor.shape))
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


def device_of(device: torch.device | str | int | None) -> torch.device | None:
    """The device, or None; an error that names the argument for what is none."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"expected device as a torch.device or its name, got {device!r}"
        ) from None


def hold(values: object) -> int | tuple[int, ...] | Held | None:
    """Integers that the host can read now, as a memo can compare them; None of what needs a closer look."""
    if type(values) is Tensor:  # values of a subclass may not be there to read
        if not values.is_cpu or (values.dtype is not torch.int32 and values.dtype is not torch.int64):
            return None
        held = tuple(values.tolist() if values.dim() == 1 else values.flatten().tolist())
        return tuple.__new__(Held, (held, values.shape))  # as Held(...), in half of the time
    if isinstance(values, int):
        return values
    if isinstance(values, (list, tuple)):
        try:
            return tuple(map(index, values))
        except TypeError:  # nested, or wrong
            pass
    return None


def split(
    values: Ints | Held | None, name: str, shapes: Sequence[tuple[int, ...]]
) -> tuple[Sequence[int], Tensor | None]:
    """Host integers as a flat list, or a tensor that the host cannot or must not read (then the list is empty)."""
    if values is None:
        return (), None
    if isinstance(values, torch.SymInt):
        return (values,), None
    if isinstance(values, Held):
        if values.shape and values.shape not in shapes:
            raise wrong_shape(name, shapes, values.shape)
        return values.values, None
    if not isinstance(values, Tensor):
        return host_ints(values, name, shapes, trusted=torch.compiler.is_compiling()), None
    if values.dtype not in (torch.int32, torch.int64):
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
            raise TypeError(f"expected {name} of integers, got {values.dtype}")
        wide, values = values.dtype == torch.uint64, values.to(torch.int64)
        if wide:  # beyond int64 they came out negative
            values = torch.where(values < 0, 2**63 - 1, values)
    if values.dim() and not is_one_of(tuple(values.shape), shapes):
        raise wrong_shape(name, shapes, values.shape)
    # A tracer cannot read a tensor: there the values of a CPU tensor count as device values.
    if not values.is_cpu or traced(values):
        return (), values
    return values.flatten().tolist(), None
