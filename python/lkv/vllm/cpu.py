"""vLLM's attention on a CPU, of prompts that are evicted when they end."""

from __future__ import annotations

import time
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

import lkv_ext
from lkv.vllm import metrics
from lkv.vllm.attention import Evicts
from lkv.vllm.layers import Layers
from lkv.vllm.metadata import Evicting
from lkv.vllm.step import Ended, Step


class Backend(Layers, CPUAttentionBackend):
    """CPU_ATTN whose layers may be evicted; without settings it is CPU_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class Builder(Evicting, CPUAttentionMetadataBuilder):
    """Plans the kernel's work for the sequences that attention will see."""

    num_heads: int
    num_kv_heads: int

    def _one_head(self) -> None:
        self.num_heads, self.num_kv_heads = self.num_heads // self.num_kv_heads, 1


class Attention(Evicts, CPUAttentionBackendImpl):
    """Attends as CPU_ATTN does, and moves the kept rows of the prompts that end in the step."""

    def _move(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step) -> None:
        start = time.perf_counter()
        for ended in step.ended:
            self._move_one(layer, key, value, kv_cache, ended)
        metrics.SECONDS.inc(time.perf_counter() - start)

    def _move_one(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, ended: Ended) -> None:
        """Writes the kept rows of a prompt behind `drop`, in their order. key, value: `[tokens, H, D]`, of the step."""
        page, computed = kv_cache.shape[2], ended.computed
        here = slice(ended.start, ended.start + ended.prompt - computed)
        keys, values = (x[here].transpose(0, 1) for x in (key, value))
        if computed:
            interior = _interior(layer.isa, kv_cache.dtype, page, self.head_size)
            before = interior.read(kv_cache, ended.tables[:, : -(-computed // page)], self.num_kv_heads)
            keys, values = (torch.cat([b[:, :computed], x], 1) for b, x in zip(before, (keys, values), strict=True))
        budgets = [ended.prompt - drop for drop in ended.drops] * (self.num_kv_heads // len(ended.drops))
        assert self.layers is not None
        kept = lkv_ext.evict(
            keys[None], values[None], self.layers.scores(keys, values), budgets,
            sink=self.layers.sink,
            window=self.layers.window,
        )  # fmt: skip
        assert kept.k is not None and kept.v is not None
        if len(ended.drops) == 1:  # the heads of a row lie beside each other
            slots = _slots(ended.tables[0], ended.drops[0], ended.prompt, page)
            k, v = (x.view(self.num_kv_heads, -1, x.shape[-1]).transpose(0, 1).contiguous() for x in (kept.k, kept.v))
        else:
            spans = zip(ended.tables, ended.drops, strict=True)
            slots = torch.cat([_slots(table, drop, ended.prompt, page) for table, drop in spans])
            k, v = kept.k[:, None], kept.v[:, None]
        self._write(layer, k, v, kv_cache, slots)


def _slots(table: Tensor, start: int, end: int, page: int) -> Tensor:
    """int64 `[end - start]`: slots of tokens of a sequence."""
    tokens = torch.arange(start, end, device="cpu")
    return table[tokens // page] * page + tokens % page


class Interior:
    """Where the numbers of a row lie inside a block, which vLLM's CPU kernels decide by instruction set.

    Found out by writing numbers through the op that writes rows. All rows are written by that op; this reads them.
    """

    def __init__(self, isa: str, dtype: torch.dtype, page: int, dim: int) -> None:
        self.shape = page, dim
        count, base = page * dim, 128  # bfloat16 holds integers up to 256
        index, digits = torch.arange(count, device="cpu"), list[Tensor]()
        while base ** len(digits) < count:
            row = (index // base ** len(digits) % base).view(page, 1, dim).to(dtype)
            block = torch.zeros(1, 1, 2 * page, dim, dtype=dtype, device="cpu")
            keys, values = block.chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(row, row, keys, values, torch.arange(page, device="cpu"), isa)
            digits.append(block.view(2, count).long())
        found = torch.stack([digit * base**i for i, digit in enumerate(digits)]).sum(0)
        places = [_strides(order, page, dim) for order in found.argsort(1)]
        if None in places or not torch.equal(found.sort(1).values, index.expand(2, count)):
            raise RuntimeError(
                f"lkv.vllm: blocks of {isa} of {dtype} do not hold rows as they come: start without lkv settings"
            )
        self.places = [place for place in places if place is not None]

    def read(self, kv_cache: Tensor, tables: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[H, tokens, D]` in the blocks of `tables`, `[1 or H, blocks]`."""
        page, dim = self.shape
        blocks = kv_cache[tables]  # [1, blocks, H, page, 2 * D] or [H, blocks, 1, page, 2 * D]
        flat = blocks.transpose(1, 2).reshape(heads, tables.shape[1], 2, page * dim)
        k, v = (
            half.as_strided((*half.shape[:2], *shape), (*half.stride()[:2], *strides), half.storage_offset())
            for half, (shape, strides) in zip(flat.unbind(2), self.places, strict=True)
        )
        return k.reshape(heads, -1, dim), v.reshape(heads, -1, dim)


def _strides(order: Tensor, page: int, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides of a block's rows, from where its numbers lie: rows and their numbers may be cut in tiles."""
    sizes = [2**i for i in range(max(page, dim).bit_length())]
    for tile, part in product(sizes, sizes):
        if page % tile or dim % part:
            continue
        shape = page // tile, tile, dim // part, part
        steps = tile * dim, dim, part, 1
        strides = tuple(int(order[step]) if size > 1 else 0 for size, step in zip(shape, steps, strict=True))
        at = torch.zeros(shape, dtype=torch.long, device="cpu")
        for axis, stride in enumerate(strides):
            at += (torch.arange(shape[axis], device="cpu") * stride).view([-1 if i == axis else 1 for i in range(4)])
        if torch.equal(at.flatten(), order):
            return shape, strides
    return None


_interior = cache(Interior)
