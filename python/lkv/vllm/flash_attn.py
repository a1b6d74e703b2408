"""vLLM's FLASH_ATTN, of prompts that are evicted when they end. Checked with stand-ins, not run on a GPU."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from lkv.vllm.gpu import InPages, MovesInPages
from lkv.vllm.layers import Layers


class Backend(Layers, FlashAttentionBackend):
    """FLASH_ATTN whose layers may be evicted; without settings it is FLASH_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class Builder(InPages, FlashAttentionMetadataBuilder):
    num_heads_q: int
    num_heads_kv: int
    use_full_cuda_graph: bool
    max_num_splits: int

    def _one_head(self) -> None:
        self.num_heads_q, self.num_heads_kv = self.num_heads_q // self.num_heads_kv, 1

    def _no_whole_graphs(self) -> None:
        self.use_full_cuda_graph, self.max_num_splits = False, 0


class Attention(MovesInPages, FlashAttentionImpl):
    """Attends as FLASH_ATTN does, and moves the kept rows of the prompts that end in the step."""
