"""Derivatives: those of gather, and a clear refusal where there are none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lkv_ext.ops.batching import EachSample, call
from lkv_ext.ops.library import ops


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, of torch.autograd or of torch.func."""
    return forward_ad._current_level >= 0


def wanted(tensors: Iterable[Tensor]) -> bool:
    """Whether a derivative may be asked for. Tangents are not looked at: those of outer levels do not show."""
    return (torch.is_grad_enabled() and any([t.requires_grad for t in tensors])) or in_forward_mode()


def refuse(tensors: Iterable[Tensor], why: str) -> None:
    """Raises ValueError where one of `tensors` requires a gradient or carries a tangent; `why` ends its message."""
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        raise ValueError(f"expected tensors that require no gradient, got some: {why}")
    refuse_tangents(tensors, why)


def refuse_tangents(tensors: Iterable[Tensor], why: str) -> None:
    if in_forward_mode():
        _NoTangents.apply(why, *tensors)


class _NoTangents(EachSample):
    """torch calls `jvp` where an input has a tangent, be it of an outer level."""

    @staticmethod
    def forward(why, *tensors):
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def jvp(ctx, *tangents):
        raise ValueError(f"expected tensors without tangents, got some: {ctx.why}")


@contextmanager
def outer_levels(tensors: Iterable[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """What `jvp` computes with. torch calls it with forward mode off, which would lose the tangents of outer levels."""
    with forward_ad._set_fwd_grad_enabled(True):
        yield [t if t is None else forward_ad.unpack_dual(t).primal for t in tensors]


def gather(
    tensors: Sequence[Tensor],
    positions: Tensor,
    cu_seqlens: Tensor,
    source: Tensor | None = None,
    batch: int = 0,
    heads: int = 0,
) -> list[Tensor]:
    """The op of the same name for tensors of one layer, differentiable in them any number of times, in either mode."""
    if wanted(tensors):
        op = _GatherInForwardMode if in_forward_mode() else _Gather
        return list(call(op, positions, cu_seqlens, source, batch, heads, *tensors))
    return ops.gather(tensors, positions, cu_seqlens, 1, source, batch, heads)


class _Gather(EachSample):
    """The gather of tensors of one layer."""

    @staticmethod
    def forward(positions, cu_seqlens, source, batch, heads, *tensors):
        return tuple(ops.gather(list(tensors), positions, cu_seqlens, 1, source, batch, heads))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        positions, cu_seqlens, source, ctx.batch, ctx.heads, *tensors = inputs
        ctx.shapes = [t.shape for t in tensors]
        ctx.save_for_backward(positions, cu_seqlens, source)
        ctx.save_for_forward(positions, cu_seqlens, source)

    @staticmethod
    def backward(ctx, *grads):
        return *[None] * 5, *_scattered(grads, ctx.shapes, ctx.needs_input_grad[5:], *ctx.saved_tensors)


class _GatherInForwardMode(_Gather):
    """Tangents move as the tensors do. Of its own, as torch.compile traces no function with a `jvp`."""

    @staticmethod
    def jvp(ctx, *tangents):
        with outer_levels(tangents[5:]) as tangents:
            given = [t.contiguous() for t in tangents if t is not None]
            moved = iter(gather(given, *ctx.saved_tensors, ctx.batch, ctx.heads))
            return tuple(None if t is None else next(moved) for t in tangents)


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
    positions = positions.reshape(-1).long()
    slots = torch.arange(positions.numel(), device=positions.device)
    row_set = torch.searchsorted(cu_seqlens, slots, right=True).sub(1).clamp(0, cu_seqlens.numel() - 2)
    results: list[Tensor | None] = []
    for i, (shape, need) in enumerate(zip(shapes, needed, strict=True)):
        if not need:
            results.append(None)
            continue
        if source is not None:
            rows, origin, mine = shape[0], source[row_set].long(), True
            limit = source[row_set + 1].long() - origin
        else:
            layer, per_layer, limit = i % layers, shape[0] * shape[1], shape[2]
            rows, origin = per_layer * limit, (row_set - layer * per_layer) * limit
            mine = row_set // max(per_layer, 1) == layer
        valid = (positions >= 0) & (positions < limit) & mine
        target = torch.where(valid, origin + positions, 0)
        grad = grads[i // layers].reshape(positions.numel(), -1)
        grad = torch.where(valid[:, None], grad, 0)
        results.append(grad.new_zeros(rows, grad.shape[1]).index_add(0, target, grad).view(shape))
    return results


def _setup(ctx, inputs, output) -> None:
    tensors, positions, cu_seqlens, ctx.layers, source, _, _ = inputs
    ctx.shapes = [t.shape for t in tensors]
    ctx.save_for_backward(positions, cu_seqlens, source)


def _backward(ctx, grads: list[Tensor]):
    results = _scattered(grads, ctx.shapes, ctx.needs_input_grad[0], *ctx.saved_tensors, ctx.layers)
    return results, *(None for _ in ctx.needs_input_grad[1:])  # arguments left at their defaults are not counted


# For those who call the op itself, and for the tracers of torch.compile.
torch.library.register_autograd("lkv_ext::gather", _backward, setup_context=_setup)
