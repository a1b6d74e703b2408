"""What the fake kernels of the ops share: shapes and dtypes without data, and the kernels' check of devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lkv_ext._common.options import MOST


def index(tensors: list[Tensor], layers: int, given: Any) -> list[Tensor]:
    """positions, lengths, cu_seqlens and, where it is counted, overflow.

    Args:
        given: the `Arguments` of the op.
        tensors: those that give B and H where they are dense, the first one also the device.
    """
    batch, heads = tensors[0].shape[:2] if given.cu_seqlens is None else (given.batch, given.heads)
    shape = [batch, heads] if layers == 1 else [layers, batch, heads]
    total, padded, rows = given.total, given.padded, 1
    for size in shape:
        rows = rows * size
    known = isinstance(total, int) and isinstance(padded, int) and isinstance(rows, int)
    if known and not (0 <= total <= MOST and padded <= MOST and (padded < 0 or total == rows * padded)):
        raise RuntimeError(
            f"ValueError: expected an output of at most 2**31 - 1 rows, {rows} spans of {padded}, got {total}"
        )
    sizes = [[total] if padded < 0 else [*shape, padded], shape, [rows + 1], *([[]] if given.count_overflow else [])]
    return [tensors[0].new_empty(size, dtype=torch.int32) for size in sizes]


def moved(payload: list[Tensor], layers: int, cu_seqlens: Tensor | None, leading: list[int]) -> list[Tensor]:
    """The rows of `payload` in an output whose first axes are `leading`."""
    token = 2 if cu_seqlens is None else 0
    return [t.new_empty([*leading, *t.shape[token + 1 :]]) for t in payload[::layers]]


def check_rows(payload: list[Tensor], scores: list[Tensor], **given: Tensor | None) -> None:
    """Raises unless all are on the device of the first tensor, as the kernels do."""
    named: dict[str, Tensor | None] = {f"payload[{i}]": t for i, t in enumerate(payload)}
    named |= {"scores" if len(scores) == 1 else f"scores[{i}]": t for i, t in enumerate(scores)}
    check_devices((payload or scores)[0].device, named | given)


def check_arguments(payload: list[Tensor], scores: list[Tensor], given: Any) -> None:
    """`check_rows` with the tensors among the arguments that the ops share."""
    integers = {name: getattr(given, f"{name}_tensor") for name in ("budgets", "lengths", "starts")}
    check_rows(payload, scores, cu_seqlens=given.cu_seqlens, **integers)


def check_devices(device: torch.device, tensors: dict[str, Tensor | None]) -> None:
    """Raises unless all are on `device`."""
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise RuntimeError(f"ValueError: expected {name} on {device}, got {t.device}")
