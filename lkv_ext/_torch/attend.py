"""Attention over rows of which every (sequence, KV head) has its own number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lkv_ext._common import errors
from lkv_ext._common.kinds import described, is_of
from lkv_ext._torch import derivatives, fake, vmap
from lkv_ext._torch.attend_backends import BACKENDS, HALF, Call
from lkv_ext._torch.library import ops
from lkv_ext.ragged import PackedRows, PagedRows

FLOATS = (torch.float32, *HALF)


def attend(
    q: Tensor,
    cache: PackedRows | PagedRows,
    causal: bool = True,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of `q` over the rows of each (sequence, KV head).

    Args:
        q: `[B, Hq, n, D]`, float32, float16 or bfloat16, any strides with contiguous rows; Hq is a multiple of H, and
            query heads `[h * Hq / H, (h + 1) * Hq / H)` read KV head h. Under autocast q is cast first.
        cache: a `RaggedCache`, a `PagedCache`, or packed `RaggedKV` of one layer; K and V float32, float16 or bfloat16,
            not necessarily the same. Rows are read as they are and summed in float32: the cache is never cast. Rows in
            pages are read there by our kernel on the CPU, by flash_attn_2 (multiples of 256 rows) and by flashinfer;
            our kernel on CUDA reads a packed copy.
        causal: the last n rows of every head are those of the n queries themselves, and query i sees all rows but the
            last n - 1 - i. False: every query sees every row.
        scale: of the logits, default `D ** -0.5`.
        softcap: logits become `softcap * tanh(logit / softcap)`, as in Gemma 2 (arXiv 2408.00118); default: no cap.
        sinks: `[Hq]`, float32, float16 or bfloat16, contiguous: a logit per query head that enlarges the denominator of
            the softmax and is neither scaled nor capped, as in gpt-oss (arXiv 2508.10925). -inf: none.
        backend: "lkv": our kernels, on the CPU flash-style (arXiv 2205.14135) over pieces of rows; "flash_attn":
            FlashAttention 3; "flash_attn_2": FlashAttention 2, for rows without reserve or with an `align` that is a
            multiple of 256; "torch": `torch.nn.attention.varlen`, from torch 2.13; "flashinfer": in pages of `align`
            rows, synchronises. Default: on CUDA the first of flash_attn, flash_attn_2 and torch that is installed and
            fits (one 16-bit dtype, Dv = D, softcap in flash_attn_2 only), otherwise lkv. flashinfer has no sinks; the
            others return the logarithm of the denominator, by which their result is corrected.

    Returns:
        `[B, Hq, n, Dv]` of q's dtype, or of autocast's; its memory is `[B, n, Hq, Dv]`. A query that sees no row gets
        zeros.

    Raises:
        ValueError, TypeError: for a wrong shape, dtype or device, where a gradient is required (there is none), and
            for a backend that is not installed or does not fit.
    """
    try:
        if not isinstance(q, Tensor) or q.dim() != 4:
            raise ValueError(f"expected q of shape [B, Hq, n, D], got {_shape(q)}")
        if cache.v is None:
            raise ValueError("expected a cache with v, got one without")
        if sinks is not None and not isinstance(sinks, Tensor):
            raise TypeError(f"expected sinks in a tensor of shape [Hq], got {_shape(sinks)}")
        tensors = (q, cache.k, cache.v) if sinks is None else (q, cache.k, cache.v, sinks)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            derivatives.refuse(tensors, "attend has no derivative")
        if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype in FLOATS:
            q = q.to(torch.get_autocast_dtype(q.device.type))
        if causal is not True and causal is not False:
            raise TypeError(f"expected causal as a bool, got {described(causal)}")
        if scale is None:
            if q.shape[-1] == 0:
                raise ValueError(f"expected q of shape [B, Hq, n, D] with D >= 1, got {list(q.shape)}")
            scale = q.shape[-1] ** -0.5
        elif type(scale) is not float and not is_of("number", scale):
            raise TypeError(f"expected scale as a number, got {described(scale)}")
        if softcap is not None and not (is_of("number", softcap) and softcap > 0):
            raise ValueError(f"expected softcap above 0, got {described(softcap)}")
        if backend not in (None, "lkv", *BACKENDS):
            names = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"expected backend 'lkv' or one of {names}, got {described(backend)}")
        if q.numel() and (q.is_cuda if backend is None else backend != "lkv"):
            call = _call(q, cache, causal, scale, softcap, sinks)
            read = _reader(call, backend)
            if read is not None:
                out = read(call).unflatten(0, (*cache.lengths.shape, q.shape[2]))  # [B, H, n, group, Dv]
                return out.transpose(1, 2).flatten(2, 3).transpose(1, 2)
        rows: Any = cache
        options = (causal, scale, softcap or 0.0, sinks)
        if hasattr(rows, "tables") and not q.is_cuda:
            paged = (rows.k, rows.v, rows.tables, rows.lengths, rows.max_length)
            return ops.attend_paged(q, *paged, *options).transpose(1, 2)
        if hasattr(rows, "tables"):  # in pages, which our kernels for GPUs do not read
            rows = rows.packed()
        spans = (rows.k, rows.v, rows.cu_seqlens, rows.lengths, rows.max_length)
        return ops.attend(q, *spans, *options).transpose(1, 2)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("attend", error, given=locals())


def _shape(q: object) -> object:
    return list(q.shape) if isinstance(q, Tensor) else type(q).__name__


def _call(
    q: Tensor,
    cache: PackedRows | PagedRows,
    causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Call:
    batch, query_heads, n, dim = q.shape
    rows, heads = cache.lengths.numel(), max(cache.lengths.shape[-1], 1)
    if rows != batch * heads or query_heads % heads:
        raise ValueError(
            f"expected q of shape [B, Hq, n, D] with B = {rows // heads} and Hq a multiple of H = {heads}, got "
            f"{list(q.shape)}"
        )
    queries = q.unflatten(1, (heads, -1)).transpose(2, 3).reshape(rows * n, query_heads // heads, dim)
    if sinks is not None:
        if sinks.shape != (query_heads,):
            raise ValueError(f"expected sinks of shape [Hq] = [{query_heads}], got {list(sinks.shape)}")
        if sinks.dtype not in FLOATS:
            raise TypeError(f"expected sinks of dtype float32, float16 or bfloat16, got {sinks.dtype}")
        if sinks.device != q.device:
            raise ValueError(f"expected sinks on {q.device}, got {sinks.device}")
        sinks = sinks.unflatten(0, (heads, -1))
    return Call(queries, cast(PackedRows, cache), n, causal, scale, softcap, sinks)


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
            f"Dv = {call.v.shape[-1]}, softcap {call.softcap}, align {call.align}"
            f"{'' if call.sinks is None else ', sinks'}"
        )
    read = chosen.load()
    if read is None:
        raise ValueError(f"expected a backend that is installed, got {backend!r}")
    return read


@torch.library.register_fake("lkv_ext::attend")
def fake_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    fake.check_devices(q.device, {"k": k, "v": v, "cu_seqlens": cu_seqlens, "lengths": lengths, "sinks": sinks})
    return q.new_empty([q.shape[0], q.shape[2], q.shape[1], v.shape[1]])


@torch.library.register_fake("lkv_ext::attend_paged")
def fake_attend_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    lengths: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    fake.check_devices(q.device, {"k": k, "v": v, "tables": tables, "lengths": lengths, "sinks": sinks})
    return q.new_empty([q.shape[0], q.shape[2], q.shape[1], v.shape[2]])


vmap.register("attend")
vmap.register("attend_paged")
