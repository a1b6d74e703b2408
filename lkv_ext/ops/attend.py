"""Attention over rows of which every (sequence, KV head) has a number of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lkv_ext.ops import errors
from lkv_ext.ops.attend_backends import BACKENDS, Call
from lkv_ext.ops.library import ops

if TYPE_CHECKING:
    from lkv_ext.ops.cache import RaggedCache
    from lkv_ext.ops.ragged import RaggedKV


def attend(
    q: Tensor,
    cache: RaggedCache | RaggedKV,
    causal: bool = True,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of `q` over the rows that every (sequence, KV head) has.

    Args:
        q: `[B, Hq, n, D]`, float32, float16 or bfloat16, any strides with contiguous rows; Hq is a multiple of H, and
            query heads `[h * Hq / H, (h + 1) * Hq / H)` read KV head h.
        cache: a `RaggedCache`, or packed `RaggedKV` of one layer; K and V of q's dtype.
        causal: the last n rows of every head are those of the n queries themselves, and query i sees all rows but the
            last n - 1 - i. False: every query sees every row.
        scale: of the logits, default `D ** -0.5`.
        softcap: logits become `softcap * tanh(logit / softcap)`, as in Gemma 2 (arXiv 2408.00118); default: no cap.
        backend: "lkv": our kernels, on the CPU flash-style (arXiv 2205.14135) over pieces of rows; "flash_attn":
            FlashAttention 3; "flash_attn_2": FlashAttention 2, for rows without reserve or with an `align` that is a
            multiple of 256; "torch": `torch.nn.attention.varlen`, from torch 2.13; "flashinfer": in pages of `align`
            rows, synchronises. Default: on CUDA the first of flash_attn, flash_attn_2 and torch that is there and fits
            (16-bit, Dv = D, no softcap save in flash_attn_2), else lkv.

    Returns:
        `[B, Hq, n, Dv]` of q's dtype; its memory is `[B, n, Hq, Dv]`. A query that sees no row gets zeros.

    Raises:
        ValueError, TypeError: for a wrong shape, dtype or device, where a gradient is required (there is none), and
            for a backend that is not there or does not fit.
    """
    try:
        if not isinstance(q, Tensor) or q.dim() != 4:
            raise ValueError(f"expected q of shape [B, Hq, n, D], got {_shape(q)}")
        if cache.v is None:
            raise ValueError("expected a cache with v, got one without")
        if torch.is_grad_enabled() and any([t.requires_grad for t in (q, cache.k, cache.v)]):
            raise ValueError("expected tensors that require no gradient, got some: attend has none")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if softcap is not None and not softcap > 0:
            raise ValueError(f"expected softcap above 0, got {softcap}")
        if backend not in (None, "lkv", *BACKENDS):
            names = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"expected backend 'lkv' or one of {names}, got {backend!r}")
        if q.numel() and (q.is_cuda if backend is None else backend != "lkv"):
            call = _call(q, cache, causal, scale, softcap)
            read = _reader(call, backend)
            if read is not None:
                out = read(call).unflatten(0, (*cache.lengths.shape, q.shape[2]))  # [B, H, n, group, Dv]
                return out.transpose(1, 2).flatten(2, 3).transpose(1, 2)
        rooms = (cache.k, cache.v, cache.cu_seqlens, cache.lengths, cache.max_length)
        return ops.attend(q, *rooms, causal, scale, softcap or 0.0).transpose(1, 2)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("attend", error)


def _shape(q: object) -> object:
    return list(q.shape) if isinstance(q, Tensor) else type(q).__name__


def _call(q: Tensor, cache: RaggedCache | RaggedKV, causal: bool, scale: float, softcap: float | None) -> Call:
    batch, query_heads, n, dim = q.shape
    rows, heads = cache.lengths.numel(), max(cache.lengths.shape[-1], 1)
    if rows != batch * heads or query_heads % heads:
        raise ValueError(
            f"expected q of shape [B, Hq, n, D] with B = {rows // heads} and Hq a multiple of H = {heads}, got "
            f"{list(q.shape)}"
        )
    queries = q.unflatten(1, (heads, -1)).transpose(2, 3).reshape(rows * n, query_heads // heads, dim)
    return Call(queries, cache, n, causal, scale, softcap)


def _reader(call: Call, backend: str | None) -> Callable[[Call], Tensor] | None:
    """Another library's kernel for this call; None: ours."""
    if backend is None:
        fit = (b.load() for b in BACKENDS.values() if b.by_default and b.lacks(call) is None)
        return next((read for read in fit if read is not None), None)
    chosen = BACKENDS[backend]
    lack = chosen.lacks(call)
    if lack is not None:
        raise ValueError(
            f"expected {lack} for backend {backend!r}, got {call.queries.dtype}, D = {call.queries.shape[-1]}, "
            f"Dv = {call.cache.v.shape[-1]}, softcap {call.softcap}, align {call.align}"
        )
    read = chosen.load()
    if read is None:
        raise ValueError(f"expected a backend that is installed, got {backend!r}")
    return read
