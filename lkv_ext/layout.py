"""Views of engines' KV pools for `lkv_ext.evict_paged_`, by name: nothing is copied, no layout is guessed from a shape.

Every function returns pools `[P, H, page, D]`, K and V, whose pages a table `[B, M]` names; `heads_as_sequences` makes
pools `[P * H, page, D]` of them, whose pages belong to one head, and tables `[B, H, M]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["flash_attention", "flashinfer", "heads_as_sequences", "hugging_face", "sglang", "tensorrt_llm"]
__all__ += ["view", "vllm"]

_AXES = "LPSHNC"

# vLLM's orders by the time they came, and those of its KVCacheLayout, whose B is our P.
_VLLM = {"kv_first": "SPNHC", "blocks_first": "PSNHC", "packed": "PHNC"}
_VLLM |= {name: name.replace("B", "P") for name in ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")}


Views = tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]


def view(cache: Tensor, axes: str, *, dim: int | None = None) -> Views:
    """K and V of a cache whose axes are named in the order in which they lie.

    Args:
        cache: the pool of one layer or of all.
        axes: a permutation of P pages, H heads, N rows of a page and C content, and S where K and V are an axis of two,
            L where the pool holds all layers. Without S, K and V lie one after the other in C.
        dim: numbers of a row of K in C, without S. Default: half.

    Returns:
        K `[P, H, N, D]` and V `[P, H, N, Dv]`; with L, one pool per layer in a list for each, as `evict_paged_` takes
        all layers in one launch.

    Raises:
        ValueError: where the axes do not fit the cache.
    """
    if sorted(axes) != sorted(axis for axis in _AXES if axis in axes or axis in "PHNC"):
        raise ValueError(f"lkv_ext.layout: expected axes P, H, N and C, perhaps S and L, got {axes!r}")
    if cache.dim() != len(axes):
        raise ValueError(f"lkv_ext.layout: expected a cache with axes {axes}, got shape {list(cache.shape)}")
    order = [axes.index(axis) for axis in _AXES if axis in axes]
    pools = cache.permute(order)
    if "L" in axes:
        layers = [_split(layer, "S" in axes, dim) for layer in pools]
        return [k for k, _ in layers], [v for _, v in layers]
    return _split(pools, "S" in axes, dim)


def hugging_face(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, H, L, D]` of a transformers cache, for `evict_` and its relatives: what they take, checked."""
    _check_rank("[B, H, L, D]", k, v)
    return k, v


def flash_attention(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention: paged `[P, page, H, D]`; or dense `[B, L, H, D]`, which becomes `[B, H, L, D]` for `evict_`."""
    _check_rank("[P, page, H, D] or [B, L, H, D]", k, v)
    return k.transpose(1, 2), v.transpose(1, 2)


def flashinfer(cache: Tensor | tuple[Tensor, Tensor], layout: str) -> tuple[Tensor, Tensor]:
    """FlashInfer: "NHD", `[P, 2, page, H, D]`, or "HND", `[P, 2, H, page, D]`; or K and V apart, without that 2."""
    if layout not in ("NHD", "HND"):
        raise ValueError(f"lkv_ext.layout: expected layout 'NHD' or 'HND', got {layout!r}")
    if isinstance(cache, Tensor):
        k, v = view(cache, "PSNHC" if layout == "NHD" else "PSHNC")
        return k, v  # type: ignore[return-value]
    k, v = cache
    _check_rank("[P, page, H, D]" if layout == "NHD" else "[P, H, page, D]", k, v)
    return (k.transpose(1, 2), v.transpose(1, 2)) if layout == "NHD" else (k, v)


def tensorrt_llm(pool: Tensor) -> tuple[Tensor, Tensor]:
    """TensorRT-LLM: the pool of a layer, `[P, 2, H, page, D]`."""
    k, v = view(pool, "PSHNC")
    return k, v  # type: ignore[return-value]


def vllm(cache: Tensor, layout: str) -> Views:
    """vLLM, by the name of the order.

    Args:
        cache: the tensor of one layer or, for the names with an L, of all.
        layout: "kv_first", `(2, blocks, block, H, D)`, until 2026-05; "blocks_first", `(blocks, 2, block, H, D)`;
            "packed", `(blocks, H, block, 2 * D)` with K and V beside each other, from 2026-06; or a name of its
            KVCacheLayout, "LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC" or "BHLNC", with K and V beside each other in C.

    Returns:
        As `view`.
    """
    if layout not in _VLLM:
        raise ValueError(f"lkv_ext.layout: expected layout of {', '.join(_VLLM)}, got {layout!r}")
    return view(cache, _VLLM[layout])


def sglang(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """SGLang: token pools `[slots, H, D]` of a layer, with the rows of `req_to_token` as tables: pages of one token."""
    _check_rank("[slots, H, D]", k, v)
    return k.unsqueeze(2), v.unsqueeze(2)


def heads_as_sequences(pools: Sequence[Tensor], tables: Tensor) -> tuple[list[Tensor], Tensor]:
    """Pages of one head each: every head gets a table of its own, and its own number of pages.

    A page of H heads is H pages of one: the page of head h in page p is p * H + h. Attention kernels for pages and one
    KV head read what comes out, every (sequence, head) a sequence: `pool.unsqueeze(2)` is `[P * H, page, 1, D]`,
    `tables.flatten(0, 1)` its block table.

    Args:
        pools: `[P, H, page, ...]`, whose heads lie outside of the rows and evenly over all pages: HND orders, and K
            beside V in the content, but not K and V as an axis between pages and heads.
        tables: `[B, M]`.

    Returns:
        Views `[P * H, page, ...]`, and new tables `[B, H, M]`. Negative ids stay negative.

    Raises:
        ValueError: where the heads of a pool do not lie evenly.
    """
    heads = pools[0].shape[1]
    for pool in pools:
        if pool.dim() < 3 or pool.shape[1] != heads:
            raise ValueError(f"lkv_ext.layout: expected pools [P, {heads}, page, ...], got {list(pool.shape)}")
        if pool.shape[0] > 1 and heads > 1 and pool.stride(0) != heads * pool.stride(1):
            raise ValueError(
                "lkv_ext.layout: expected pools whose heads lie evenly over all pages, stride(0) = H * stride(1), got "
                f"strides {list(pool.stride())} for H = {heads}"
            )
    own = tables[:, None] * heads + torch.arange(heads, dtype=tables.dtype, device=tables.device)[:, None]
    return [pool.flatten(0, 1) for pool in pools], torch.where(tables[:, None] < 0, tables[:, None], own)


def _split(pool: Tensor, has_axis: bool, dim: int | None) -> tuple[Tensor, Tensor]:
    """K and V of `[P, S, H, N, C]` or `[P, H, N, C]`."""
    if not has_axis:
        half = pool.shape[-1] // 2 if dim is None else dim
        if dim is None and pool.shape[-1] % 2 != 0:
            raise ValueError(f"lkv_ext.layout: expected K beside V in an even number, got {pool.shape[-1]}")
        if not 0 < half < pool.shape[-1]:
            raise ValueError(f"lkv_ext.layout: expected dim in [1, {pool.shape[-1]}), got {half}")
        return pool[..., :half], pool[..., half:]
    if pool.shape[1] != 2:
        raise ValueError(f"lkv_ext.layout: expected an axis of two, K and V, got {pool.shape[1]}")
    return pool[:, 0], pool[:, 1]


def _check_rank(form: str, *tensors: Tensor) -> None:
    rank = form.split(" or ")[0].count(",") + 1
    for t in tensors:
        if t.dim() != rank:
            raise ValueError(f"lkv_ext.layout: expected shape {form}, got {list(t.shape)}")
