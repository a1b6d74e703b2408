"""Integers of the caller: budgets, lengths and starts, on the host, on a device, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.kinds import described, is_of
from lkv_ext._common.options import Shapes, flatten, host_ints, is_one_of, wrong_shape
from lkv_ext._torch.modes import traced

Ints = int | Sequence[int] | Sequence[Sequence[int]] | Tensor


class HostInts(NamedTuple):
    """The values of a tensor on the host, hashable, for the memo of requests."""

    values: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(slots=True)
class Plan:
    """Budgets and lengths on the host and on a device at once; see `plan`."""

    budgets: list[int]
    budgets_tensor: Tensor
    lengths: list[int]
    lengths_tensor: Tensor | None

    def read(self, name: str, shapes: Shapes) -> tuple[list[int], Tensor | None]:
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
        device: where the kernels will run; default: torch's default device.

    Returns:
        A plan, with both copies.

    Raises:
        TypeError: where a value is not an integer.
        ValueError: for a tensor that is traced or fake, which has no values to copy.
    """
    try:
        device = device_of(device) or torch.get_default_device()
        values, budgets_tensor = _both(budgets, "budgets", device)
        if lengths is None:
            return Plan(values, budgets_tensor, [], None)
        return Plan(values, budgets_tensor, *_both(lengths, "lengths", device))
    except (RuntimeError, ValueError, TypeError) as error:
        errors.reraise("plan", error, given=locals())


def _both(values: Ints, name: str, device: torch.device) -> tuple[list[int], Tensor]:
    if isinstance(values, (list, tuple)) and is_of("numbers", values) and not is_of("integers", values):
        dtype = torch.as_tensor(values, device="cpu").dtype
        raise TypeError(f"expected {name} of integers, got {dtype}")
    if isinstance(values, Tensor):
        host, unread = split(values.cpu(), name, [tuple(values.shape)])
        if unread is not None:
            raise ValueError(f"expected {name} that can be read now, as a plan copies them, got a traced tensor")
        shape: tuple[int, ...] = tuple(values.shape)
    else:
        shape = () if isinstance(values, int) else flatten(values, name)[1]
        host = host_ints(values, name, [shape])
    tensor = torch.tensor(host, dtype=torch.int64, device="cpu").view(shape)
    return list(host), tensor.to(device)


def device_of(device: torch.device | str | int | None) -> torch.device | None:
    """The device, or None; raises an error that names the argument where it is not one."""
    if device is None:
        return None
    try:
        return torch.empty(0, device=torch.device(device)).device
    except TypeError:
        raise TypeError(f"expected device as a torch.device or its name, got {described(device)}") from None
    except (RuntimeError, ValueError, AssertionError):  # torch asserts that it was built for CUDA
        raise ValueError(f"expected device that this torch can use, got {described(device)}") from None


def hashable(values: object) -> int | tuple[int, ...] | HostInts | None:
    """Integers that the host can read now, in a form that a memo can compare; None where they need a closer look."""
    if type(values) is Tensor:  # a subclass may have no values to read
        if not values.is_cpu or (values.dtype is not torch.int32 and values.dtype is not torch.int64):
            return None
        host = tuple(values.tolist() if values.dim() == 1 else values.flatten().tolist())
        return tuple.__new__(HostInts, (host, values.shape))  # as HostInts(...), in half of the time
    if isinstance(values, int):
        return values
    if isinstance(values, (list, tuple)):
        try:
            return tuple(map(index, values))
        except TypeError:  # nested, or wrong
            pass
    return None


def split(
    values: Ints | HostInts | None, name: str, shapes: Sequence[tuple[int, ...]]
) -> tuple[Sequence[int], Tensor | None]:
    """Host integers as a flat list, or a tensor that the host cannot or must not read (then the list is empty)."""
    if values is None:
        return (), None
    if isinstance(values, torch.SymInt):
        symbolic: Any = values
        return (symbolic,), None
    if isinstance(values, HostInts):
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


def int_list(values: Tensor | Sequence[int], name: str) -> list[int]:
    """Integers of one dimension as a list; a tensor on a device is read."""
    if isinstance(values, Tensor):
        values = values.cpu()  # other dtypes are refused below
    flat, shape = flatten(values, name)
    if len(shape) != 1:
        raise ValueError(f"expected {name} as a list of integers, got shape {list(shape)}")
    return flat
