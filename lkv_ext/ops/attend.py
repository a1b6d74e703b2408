"""Attention over rows of which every (sequence, KV head) has a number of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lkv_ext.ops import errors
from lkv_ext.ops.library import ops

if TYPE_CHECKING:
    from lkv_ext.ops.cache import RaggedCache
    from lkv_ext.ops.ragged import RaggedKV

# (q [R * n, group, D], k [T, 1, D], v, cu_seqlens of q, rooms, lengths, n, longest, causal, scale) -> [R * n, group, D]
Reader = Callable[..., Tensor]


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
            FlashAttention 3; "torch": `torch.nn.attention.varlen`, from torch 2.13. Default: on CUDA the first of
            flash_attn and torch that is there and fits (16-bit, no softcap, Dv = D), else lkv.

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
        reader = _reader(q, cache, softcap, backend)
        if reader is not None:
            return _read(reader, q, cache, causal, scale)
        rooms = (cache.k, cache.v, cache.cu_seqlens, cache.lengths, cache.max_length)
        return ops.attend(q, *rooms, causal, scale, softcap or 0.0).transpose(1, 2)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("attend", error)


def _shape(q: object) -> object:
    return list(q.shape) if isinstance(q, Tensor) else type(q).__name__


def _reader(q: Tensor, cache: RaggedCache | RaggedKV, softcap: float | None, backend: str | None) -> Reader | None:
    """Another library's kernel for this call; None: ours."""
    if backend == "lkv" or (backend is None and not q.is_cuda):
        return None
    if backend not in (None, *_READERS):
        raise ValueError(f"expected backend 'lkv', 'flash_attn' or 'torch', got {backend!r}")
    fits = softcap is None and cache.v.shape[-1] == q.shape[-1] <= 256 and q.dtype in (torch.float16, torch.bfloat16)
    readers = {name: _READERS[name]() for name in (_READERS if backend is None else [backend])}
    found = [reader for reader in readers.values() if reader is not None and fits]
    if found or backend is None:
        return found[0] if found else None
    if fits:
        raise ValueError(f"expected a backend that is installed, got {backend!r}")
    raise ValueError(
        f"expected float16 or bfloat16, Dv = D <= 256 and no softcap for backend {backend!r}, got {q.dtype}, "
        f"D = {q.shape[-1]}, Dv = {cache.v.shape[-1]}, softcap {softcap}"
    )


def _read(reader: Reader, q: Tensor, cache: RaggedCache | RaggedKV, causal: bool, scale: float) -> Tensor:
    """Every (sequence, KV head) as a sequence whose queries have one head for each of the group."""
    batch, query_heads, n, dim = q.shape
    rows = cache.lengths.numel()
    heads = max(rows // max(batch, 1), 1)
    queries = q.unflatten(1, (heads, -1)).transpose(2, 3).reshape(rows * n, query_heads // heads, dim)
    starts = torch.arange(0, rows * n + 1, max(n, 1), dtype=torch.int32, device=q.device)[: rows + 1]
    lengths = cache.lengths.flatten()
    k, v = cache.k[:, None], cache.v[:, None]
    out = reader(queries, k, v, starts, cache.cu_seqlens, lengths, n, cache.max_length, causal, scale)
    return out.view(batch, heads, n, query_heads // heads, -1).transpose(2, 3).flatten(1, 2)


@lru_cache(maxsize=1)
def _flash_attn() -> Reader | None:
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        return None

    def read(q, k, v, starts, rooms, lengths, n, longest, causal, scale):
        out = flash_attn_varlen_func(
            q, k, v, starts, rooms, n, longest, seqused_k=lengths, softmax_scale=scale, causal=causal
        )
        return out[0] if isinstance(out, tuple) else out

    return read


@lru_cache(maxsize=1)
def _torch_varlen() -> Reader | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    import inspect

    if "seqused_k" not in inspect.signature(varlen_attn).parameters:
        return None

    def read(q, k, v, starts, rooms, lengths, n, longest, causal, scale):
        sides = (-1, 0) if causal else (-1, -1)
        options = dict(scale=scale, window_size=sides, enable_gqa=True, seqused_k=lengths)
        return varlen_attn(q, k, v, starts, rooms, n, longest, **options)

    return read


_READERS: dict[str, Callable[[], Reader | None]] = {"flash_attn": _flash_attn, "torch": _torch_varlen}
