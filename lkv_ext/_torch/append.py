"""append_: new tokens behind the rows of every segment of a cache, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkv_ext._torch import fake


def check_rows(rows: Sequence[Tensor], buffers: Sequence[Tensor], names: Sequence[str], batch: int, heads: int) -> None:
    """Raises unless new rows `[B, H, n, ...]`, k and v first, fit the buffers `[T, ...]` of a cache."""
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


@torch.library.register_fake("lkv_ext::append_")
def fake_append_(
    cache: list[Tensor],
    positions: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    rows: list[Tensor],
    position: int,
    valid: list[int] | None = None,
    valid_tensor: Tensor | None = None,
) -> None:
    fake.check_rows(rows, [], cu_seqlens=cu_seqlens)
    named = {"cache.positions": positions, "cache.lengths": lengths, "valid": valid_tensor}
    fake.check_devices(rows[0].device, named | {f"cache[{i}]": t for i, t in enumerate(cache)})
