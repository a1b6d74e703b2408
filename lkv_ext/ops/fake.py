"""Fake kernels of the ops (shapes and dtypes without data) and the gradient of gather."""

from __future__ import annotations

import torch
from torch import Tensor


def _row_sets(tensors: list[Tensor], layers: int, batch: int, heads: int, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is None:
        batch, heads = tensors[0].shape[:2]
    return [batch, heads] if layers == 1 else [layers, batch, heads]


def _index(like: Tensor, shape: list[int], total: int, padded: int, count_overflow: bool) -> tuple[Tensor, ...]:
    rows = 1
    for size in shape:
        rows = rows * size
    return (
        like.new_empty([total] if padded < 0 else [*shape, padded], dtype=torch.int32),
        like.new_empty(shape, dtype=torch.int32),
        like.new_empty([rows + 1], dtype=torch.int32),
        like.new_empty([] if count_overflow else [0], dtype=torch.int32),
    )


def _moved(payload: list[Tensor], layers: int, ragged: bool, leading: list[int]) -> list[Tensor]:
    return [t.new_empty([*leading, *t.shape[1 if ragged else 3 :]]) for t in payload[::layers]]


@torch.library.register_fake("lkv_ext::select")
def _select(scores, batch, heads, cu_seqlens, *sizes):
    shape = _row_sets(scores, len(scores), batch, heads, cu_seqlens)
    return _index(scores[0], shape, *_total_and_form(sizes))


@torch.library.register_fake("lkv_ext::evict")
def _evict(payload, scores, batch, heads, cu_seqlens, *sizes):
    shape = _row_sets(payload, len(scores), batch, heads, cu_seqlens)
    index = _index(payload[0], shape, *_total_and_form(sizes))
    return _moved(payload, len(scores), cu_seqlens is not None, list(index[0].shape)), *index


@torch.library.register_fake("lkv_ext::evict_out")
def _evict_out(*args):
    return None


@torch.library.register_fake("lkv_ext::evict_")
def _evict_(payload, scores, batch, heads, cu_seqlens, *sizes):
    shape = _row_sets(payload, len(scores), batch, heads, cu_seqlens)
    return _index(payload[0], shape, *_total_and_form(sizes))


@torch.library.register_fake("lkv_ext::gather")
def _gather(tensors, layers, batch, heads, source_cu_seqlens, positions, cu_seqlens):
    return _moved(tensors, layers, source_cu_seqlens is not None, list(positions.shape))


def _total_and_form(sizes: tuple) -> tuple[int, int, bool]:
    """total, padded and count_overflow of the arguments after cu_seqlens (csrc/torch/arguments.h)."""
    return sizes[8], sizes[9], sizes[13]


def _gather_setup(ctx, inputs, output) -> None:
    tensors, ctx.layers, _, _, source_cu_seqlens, positions, cu_seqlens = inputs
    ctx.shapes = [t.shape for t in tensors]
    ctx.ragged = source_cu_seqlens is not None
    ctx.save_for_backward(positions, cu_seqlens, source_cu_seqlens)


def _gather_backward(ctx, grads: list[Tensor]):
    """Every kept row sends its gradient back to where it came from; slack rows add zero to row 0."""
    positions, cu_seqlens, source = ctx.saved_tensors
    positions = positions.reshape(-1).long()
    slots = torch.arange(positions.numel(), device=positions.device)
    row_set = torch.searchsorted(cu_seqlens, slots, right=True).sub_(1).clamp_(0, cu_seqlens.numel() - 2)
    results: list[Tensor | None] = []
    for i, shape in enumerate(ctx.shapes):
        layer, tokens = i % ctx.layers, shape[0 if ctx.ragged else 2]
        rows = shape[:1].numel() if ctx.ragged else shape[:3].numel()
        if ctx.ragged:
            origin, mine = source[row_set].long(), True
            limit = source[row_set + 1].long() - origin
        else:
            per_layer = shape[0] * shape[1]
            origin = (row_set - layer * per_layer) * tokens
            mine, limit = row_set // max(per_layer, 1) == layer, tokens
        valid = (positions >= 0) & (positions < limit) & mine
        target = torch.where(valid, origin + positions, 0)
        grad = grads[i // ctx.layers].reshape(positions.numel(), -1)
        grad = torch.where(valid[:, None], grad, 0)
        results.append(grad.new_zeros(rows, grad.shape[1]).index_add_(0, target, grad).view(shape))
    return results, None, None, None, None, None, None


torch.library.register_autograd("lkv_ext::gather", _gather_backward, setup_context=_gather_setup)
