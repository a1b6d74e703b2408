"""vLLM's FLASHINFER, of prompts that are evicted when they end. Checked with stand-ins, not run on a GPU.

All of its ways to attend read the tables and lengths of the metadata: its own kernels by page indices that it copies
out of the tables, those of TensorRT-LLM and XQA by the tables themselves.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadataBuilder,
)
from vllm.v1.utils import CpuGpuBuffer

from lkv.vllm.gpu import InPages, MovesInPages
from lkv.vllm.layers import Layers


class Backend(Layers, FlashInferBackend):
    """FLASHINFER whose layers may be evicted; without settings it is FLASHINFER."""

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class Builder(InPages, FlashInferMetadataBuilder):
    num_qo_heads: int
    num_kv_heads: int
    max_num_reqs: int
    _prefill_wrapper: Any
    _decode_wrapper: Any
    _other: Builder | None = None

    def _one_head(self) -> None:
        self.num_qo_heads, self.num_kv_heads = self.num_qo_heads // self.num_kv_heads, 1
        self.max_num_reqs *= self.heads
        self._take_buffers()

    def _no_whole_graphs(self) -> None:
        self.enable_cuda_graph = False

    def _other_builder(self) -> Builder:
        """A plan is in the wrapper that made it, and in buffers of the builder: a second one needs its own."""
        if self._other is None:
            self._get_workspace_buffer()  # is shared: attention is one call after the other
            self._other = copy.copy(self)
            self._other._prefill_wrapper = self._other._decode_wrapper = None
            self._other._take_buffers()
        return self._other

    def _take_buffers(self) -> None:
        """Page indices of all sequences, as vLLM's builder has them, of as many as there are tables."""
        sequences, pages = self.max_num_reqs, cdiv(self.model_config.max_model_len, self.page)
        numbers: dict[str, Any] = dict(dtype=torch.int32, device=self.device)
        self.paged_kv_indptr = CpuGpuBuffer(sequences + 1, pin_memory=False, **numbers)
        self.paged_kv_indices = torch.zeros(sequences * pages, **numbers)
        self.paged_kv_last_page_len = CpuGpuBuffer(sequences, pin_memory=False, **numbers)


class Attention(MovesInPages, FlashInferImpl):
    """Attends as FLASHINFER does, and moves the kept rows of the prompts that end in the step."""
