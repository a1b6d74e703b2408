"""gather: moves the rows that an index names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._torch import derivatives, fake, vmap
from lkv_ext._torch.library import ops
from lkv_ext._torch.vmap import EachSample, call
from lkv_ext.ragged import RaggedIndex


def gather(tensors: Sequence[Tensor], index: RaggedIndex, *, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    """Moves the rows that an index names.

    Args:
        tensors: dense `[B, H, L, ...]` or, with `cu_seqlens`, ragged `[T, ...]`; any dtypes, contiguous after the token
            axis, one L for all.
        index: what `select` returned for scores of these segments. Its values are not trusted: a position outside
            the segment gives a row of zeros.
        cu_seqlens: int32 `[B * H + 1]` of ragged input.

    Returns:
        One tensor for each: `[T', ...]` or, with a padded index, `[B, H, C, ...]`. Differentiable, in either mode.

    Raises:
        ValueError, TypeError: for a wrong shape, device or dtype.
    """
    try:
        moved = list(tensors)
        if not moved:
            return []
        if cu_seqlens is None:
            return gather_rows(moved, index.positions, index.cu_seqlens)
        heads = index.lengths.shape[-1]
        batch = index.lengths.numel() // max(heads, 1)
        return gather_rows(moved, index.positions, index.cu_seqlens, cu_seqlens, batch, heads)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("gather", error, [f"tensors[{i}]" for i in range(1000)], given=locals())


def gather_rows(
    tensors: Sequence[Tensor],
    positions: Tensor,
    cu_seqlens: Tensor,
    source: Tensor | None = None,
    batch: int = 0,
    heads: int = 0,
) -> list[Tensor]:
    """The op for tensors of one layer, differentiable in them any number of times, in either mode."""
    if derivatives.wanted(tensors):
        op = _GatherInForwardMode if derivatives.in_forward_mode() else _Gather
        return list(call(op, positions, cu_seqlens, source, batch, heads, *tensors))
    return ops.gather(tensors, positions, cu_seqlens, 1, source, batch, heads)


class _Gather(EachSample):
    """The gather of tensors of one layer."""

    @staticmethod
    def forward(
        positions: Tensor, cu_seqlens: Tensor, source: Tensor | None, batch: int, heads: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(ops.gather(list(tensors), positions, cu_seqlens, 1, source, batch, heads))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        positions, cu_seqlens, source, ctx.batch, ctx.heads, *tensors = inputs
        ctx.shapes = [t.shape for t in tensors]
        ctx.save_for_backward(positions, cu_seqlens, source)
        ctx.save_for_forward(positions, cu_seqlens, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *[None] * 5, *_scattered(grads, ctx.shapes, ctx.needs_input_grad[5:], *ctx.saved_tensors)


class _GatherInForwardMode(_Gather):
    """Tangents move as the tensors do. A class of its own, as torch.compile traces no function with a `jvp`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with derivatives.outer_levels(tangents[5:]) as inner:
            given = [t.contiguous() for t in inner if t is not None]
            positions, cu_seqlens, source = ctx.saved_tensors
            moved = iter(gather_rows(given, positions, cu_seqlens, source, ctx.batch, ctx.heads))
            return tuple(None if t is None else next(moved) for t in inner)


def _scattered(
    grads: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    needed: Sequence[bool],
    positions: Tensor,
    cu_seqlens: Tensor,
    source: Tensor | None,
    layers: int = 1,
) -> list[Tensor | None]:
    """Every kept row sends its gradient back to where it came from; slack rows add zero to row 0."""
    positions = positions.reshape(-1)
    slots = torch.arange(positions.numel(), device=positions.device)
    segment = torch.searchsorted(cu_seqlens, slots, right=True).sub(1).clamp(0, cu_seqlens.numel() - 2)
    results: list[Tensor | None] = []
    rows: int
    limit: Tensor | int
    mine: Tensor | bool
    for i, (shape, need) in enumerate(zip(shapes, needed, strict=True)):
        if not need:
            results.append(None)
            continue
        if source is not None:
            rows, origin, mine = shape[0], source[segment], True
            limit = source[segment + 1] - origin
        else:
            layer, per_layer, limit = i % layers, shape[0] * shape[1], shape[2]
            rows, origin = per_layer * shape[2], (segment - layer * per_layer) * shape[2]
            mine = segment // max(per_layer, 1) == layer
        valid = (positions >= 0) & (positions < limit) & mine
        target = torch.where(valid, origin + positions, 0)
        grad = grads[i // layers].reshape(positions.numel(), -1)
        grad = torch.where(valid[:, None], grad, 0)
        results.append(grad.new_zeros(rows, grad.shape[1]).index_add(0, target, grad).view(shape))
    return results


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, positions, cu_seqlens, ctx.layers, source, _, _ = inputs
    ctx.shapes = [t.shape for t in tensors]
    ctx.save_for_backward(positions, cu_seqlens, source)


def _backward(ctx: Any, grads: list[Tensor]) -> Any:
    positions, cu_seqlens, source = ctx.saved_tensors
    results = _scattered(grads, ctx.shapes, ctx.needs_input_grad[0], positions, cu_seqlens, source, ctx.layers)
    return results, *(None for _ in ctx.needs_input_grad[1:])  # arguments left at their defaults are not counted


# For those who call the op itself, and for the tracers of torch.compile.
torch.library.register_autograd("lkv_ext::gather", _backward, setup_context=_setup)


@torch.library.register_fake("lkv_ext::gather")
def fake_gather(
    tensors: list[Tensor],
    positions: Tensor,
    cu_seqlens: Tensor,
    layers: int = 1,
    source_cu_seqlens: Tensor | None = None,
    *_: Any,
) -> list[Tensor]:
    fake.check_rows(tensors, [], cu_seqlens=source_cu_seqlens)
    fake.check_devices(tensors[0].device, {"index.positions": positions, "index.cu_seqlens": cu_seqlens})
    return fake.moved(tensors, layers, source_cu_seqlens, list(positions.shape))


vmap.register("gather")
