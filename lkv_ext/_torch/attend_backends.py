"""Kernels of other libraries for `attend`: every (sequence, KV head) is a sequence of one KV head to them.

torch's own runs in the GPU suite; the others are checked against stand-ins of the same signature that compute the
reference. Signatures: flash_attn_interface of FlashAttention 3, flash_attn 2.8, flashinfer 0.7.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lkv_ext.ragged import PackedRows

HALF = (torch.float16, torch.bfloat16)
PAGE = 256  # pages of FlashAttention 2 are multiples of it
WORKSPACE = 128 * 2**20  # bytes of FlashInfer's workspace


@dataclass(frozen=True)
class Call:
    """One call of `attend`, with the queries in the form of these libraries.

    Attributes:
        queries: `[R * n, group, D]`, R = B * H.
        cache: packed rows of R heads.
        n: queries of every segment.
        sinks: `[H, group]`.
    """

    queries: Tensor
    cache: PackedRows
    n: int
    causal: bool
    scale: float
    softcap: float | None
    sinks: Tensor | None = None

    @property
    def v(self) -> Tensor:
        assert self.cache.v is not None  # `attend` has checked it
        return self.cache.v

    @property
    def starts(self) -> Tensor:
        """int32 `[R + 1]`: where the queries of each segment begin."""
        rows = self.cache.lengths.numel()
        steps = torch.arange(rows + 1, dtype=torch.int32, device=self.queries.device)
        return steps * self.n

    @property
    def lengths(self) -> Tensor:
        return self.cache.lengths.flatten()

    @property
    def align(self) -> int:
        return getattr(self.cache, "align", 1)

    @property
    def in_pages(self) -> bool:
        """Whether rows lie in the pages of `block_table`, which are not those of spans."""
        return self.cache.k.dim() == 3

    @property
    def is_tight(self) -> bool:
        """Whether spans are known to have no slack."""
        return getattr(self.cache, "reserve", None) == 0 and self.align == 1

    def pages(self) -> tuple[Tensor, Tensor]:
        """K and V `[pages, align, 1, D]`."""
        if self.in_pages:
            return self.cache.k[:, :, None], self.v[:, :, None]
        whole = len(self.cache.k) // self.align * self.align
        k, v = (t[:whole].unflatten(0, (-1, self.align))[:, :, None] for t in (self.cache.k, self.v))
        return k, v

    def finish(self, result: Tensor | tuple[Tensor, ...]) -> Tensor:
        """What a library returned, as if the sinks had been among its logits.

        Args:
            result: out, `[R * n, group, D]` or `[R, n, group, D]`, or a tuple that begins with out and float32 lse,
                `[group, R * n]` or `[R, group, n]`, the natural logarithm of the sum of the exponentials of a query's
                logits.
        """
        out, lse = result[:2] if isinstance(result, tuple) else (result, None)
        out = out.flatten(0, -3)
        if self.sinks is None:
            return out
        (total, group), rows = out.shape[:2], self.cache.lengths
        if lse is None or lse.shape not in ((group, total), (rows.numel(), group, self.n)):
            got = None if lse is None else list(lse.shape)
            raise RuntimeError(f"expected logsumexp of shape {[group, total]} from this backend, got {got}")
        lse = lse.T if lse.dim() == 2 else lse.transpose(1, 2).flatten(0, 1)
        sinks = self.sinks[:, None].expand(*rows.shape, self.n, group).flatten(0, 2)
        # e^lse / (e^lse + e^sink); lse is infinite where a query saw no row, and out zero.
        share = torch.sigmoid(lse - sinks).where(lse.isfinite(), 1.0)
        return (out * share[..., None]).to(out.dtype)


@dataclass(frozen=True)
class Backend:
    """Another library.

    Attributes:
        load: the function that reads, or None where the library is not installed or too old.
        lacks: what a call must be that this one is not; None: it fits.
        by_default: whether it may be chosen where the caller names no backend.
    """

    load: Callable[[], Callable[[Call], Tensor] | None]
    lacks: Callable[[Call], str | None]
    by_default: bool = True


def _lacks(
    call: Call, dims: range | tuple[int, ...], softcap: bool, sinks: bool = True, pages: bool = True
) -> str | None:
    q, k, v = call.queries, call.cache.k, call.v
    if call.in_pages and not pages:
        return "rows that are not in pages"
    fits = q.dtype == k.dtype == v.dtype in HALF and q.shape[-1] == k.shape[-1] == v.shape[-1] in dims
    if fits and (softcap or call.softcap is None) and (sinks or call.sinks is None):
        return None
    allowed = f"D <= {dims[-1]}" if isinstance(dims, range) else f"D of {', '.join(map(str, dims))}"
    refused = [name for name, known in (("softcap", softcap), ("sinks", sinks)) if not known]
    return f"float16 or bfloat16, Dv = {allowed}{' and no ' if refused else ''}{' or '.join(refused)}"


def _import(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


@lru_cache(maxsize=1)
def _flash_attn_3() -> Callable[[Call], Tensor] | None:
    module = _import("flash_attn_interface")
    if module is None:
        return None
    # Older versions always return lse.
    has_option = "return_attn_probs" in inspect.signature(module.flash_attn_varlen_func).parameters

    def read(call: Call) -> Tensor:
        cache, options = call.cache, {} if call.sinks is None or not has_option else dict(return_attn_probs=True)
        result = module.flash_attn_varlen_func(
            call.queries,
            cache.k[:, None],
            call.v[:, None],
            call.starts,
            cache.cu_seqlens,
            call.n,
            cache.max_length,
            seqused_k=call.lengths,
            softmax_scale=call.scale,
            causal=call.causal,
            **options,
        )
        return call.finish(result)

    return read


@lru_cache(maxsize=1)
def _flash_attn_2() -> Callable[[Call], Tensor] | None:
    module = _import("flash_attn")
    if module is None or not hasattr(module, "flash_attn_with_kvcache"):
        return None

    def read(call: Call) -> Tensor:
        """Spans with slack are read as pages, which is the only form that it has for them."""
        cache, options = call.cache, dict(softmax_scale=call.scale, causal=call.causal, softcap=call.softcap or 0.0)
        if call.is_tight:
            k, v = cache.k[:, None], call.v[:, None]
            sizes = (call.starts, cache.cu_seqlens, call.n, cache.max_length)
            if call.sinks is not None:
                options["return_attn_probs"] = True
            return call.finish(module.flash_attn_varlen_func(call.queries, k, v, *sizes, **options))
        if call.sinks is not None:
            options["return_softmax_lse"] = True
        paged = dict(cache_seqlens=call.lengths, block_table=cache.block_table)
        queries = call.queries.unflatten(0, (-1, call.n))
        return call.finish(module.flash_attn_with_kvcache(queries, *call.pages(), **paged, **options))

    return read


def _flash_attn_2_lacks(call: Call) -> str | None:
    if not call.is_tight and call.align % PAGE:
        return f"rows without reserve, or an align that is a multiple of {PAGE},"
    return _lacks(call, range(8, 257, 8), softcap=True)


@lru_cache(maxsize=1)
def _torch_varlen() -> Callable[[Call], Tensor] | None:
    module = _import("torch.nn.attention.varlen")
    if module is None or "seqused_k" not in inspect.signature(module.varlen_attn).parameters:
        return None

    def read(call: Call) -> Tensor:
        cache, sides = call.cache, (-1, 0) if call.causal else (-1, -1)
        options = dict(scale=call.scale, window_size=sides, enable_gqa=True, seqused_k=call.lengths)
        if call.sinks is not None:
            options["return_aux"] = module.AuxRequest(lse=True)
        sizes = (call.starts, cache.cu_seqlens, call.n, cache.max_length)
        return call.finish(module.varlen_attn(call.queries, cache.k[:, None], call.v[:, None], *sizes, **options))

    return read


@lru_cache(maxsize=1)
def _flashinfer() -> Callable[[Call], Tensor] | None:
    module = _import("flashinfer")
    if module is None:
        return None
    local = threading.local()  # its wrappers keep state between plan and run

    def wrapper(device: torch.device) -> Any:
        made = vars(local).setdefault("made", {})
        if device not in made:
            space = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
            made[device] = module.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        return made[device]

    def read(call: Call) -> Tensor:
        """Pages are those of `align`, or rows. Its plan is made on the host: this synchronises, at every call."""
        cache, size, device = call.cache, call.align, call.queries.device
        lengths = call.lengths.cpu()
        counts = -(-lengths // size)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        total = int(ends[-1])
        own = ends[:-1].to(device)  # where the pages of each segment begin in the list of all
        segment = torch.arange(len(counts), device=device).repeat_interleave(counts.to(device), output_size=total)
        place = torch.arange(total, dtype=torch.int32, device=device) - own[segment]
        if call.in_pages:
            assert cache.block_table is not None
            indices = cache.block_table[segment, place]
        else:
            indices = (cache.cu_seqlens[:-1] // size)[segment] + place
        last = lengths - (counts - 1).clamp(min=0) * size
        planned = wrapper(device)
        planned.plan(
            call.starts.cpu(),
            ends,
            indices,
            last,
            call.queries.shape[1],
            1,
            call.queries.shape[2],
            size,
            causal=call.causal,
            sm_scale=call.scale,
            logits_soft_cap=call.softcap or 0.0,
            q_data_type=call.queries.dtype,
            kv_data_type=cache.k.dtype,
        )
        return planned.run(call.queries, call.pages())

    return read


BACKENDS: dict[str, Backend] = {
    "flash_attn": Backend(_flash_attn_3, lambda call: _lacks(call, range(1, 257), softcap=False, pages=False)),
    "flash_attn_2": Backend(_flash_attn_2, _flash_attn_2_lacks),
    "torch": Backend(_torch_varlen, lambda call: _lacks(call, range(1, 257), softcap=False, pages=False)),
    "flashinfer": Backend(
        _flashinfer, lambda call: _lacks(call, (64, 128, 256), softcap=True, sinks=False), by_default=False
    ),
}
