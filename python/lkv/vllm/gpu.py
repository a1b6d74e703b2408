"""What the backends for GPUs share: rows move inside the pages of the pool, and nothing waits for the device.

Checked with stand-ins for the kernels of FlashAttention and FlashInfer, not run on a GPU.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lkv.vllm.attention import Evicts
from lkv.vllm.metadata import Evicting
from lkv.vllm.step import Step


class InPages(Evicting):
    """A metadata builder whose prompts are evicted in the pages of the pool. Its steps are in no graph as a whole."""

    in_place = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
        if not self.evicts:
            return
        if self.page & (self.page - 1):
            raise ValueError(f"lkv.vllm: expected --block-size to be a power of two, got {self.page}")
        self._no_whole_graphs()

    @abstractmethod
    def _no_whole_graphs(self) -> None:
        """Undoes what the builder has prepared for them, where it is made before vLLM knows that there are none."""


class MovesInPages(Evicts):
    """An attention whose rows move in the pages of the pool."""

    head_size: int

    def _move(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step) -> None:
        assert self.layers is not None and step.pages is not None
        step.pages.evict(kv_cache, self.layers.scores, self.layers.sink, self.layers.window)

    def _reserve(self, key: Tensor) -> None:
        """As much as the rows of the longest prompt take when they are scored."""
        assert self.layers is not None
        tokens = self.layers.vllm_config.model_config.max_model_len
        torch.empty(2, self.num_kv_heads, tokens, self.head_size, dtype=key.dtype, device=key.device)
