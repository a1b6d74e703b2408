"""What vLLM's attention does for prompts that are evicted, whatever its kernels: it attends to what is left of them,
and has the kept rows moved where they end.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context

from lkv.vllm import metrics
from lkv.vllm.layers import Plan, plan
from lkv.vllm.step import Step


class Evicts(ABC):
    """Makes an attention of vLLM attend to evicted sequences; before it in the order of bases.

    Attributes:
        layers: None for a layer that is not evicted.
        of_head: the same attention, with the numbers of heads of one KV head and its group of query heads.
    """

    num_heads: int
    num_kv_heads: int
    num_queries_per_kv: int
    layers: Plan | None
    of_head: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers, self.of_head = plan(self, get_current_vllm_config()), None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if self.layers is not None:
            self.layers.loaded(self)
            self.of_head = copy.copy(self)
            self.of_head.num_heads, self.of_head.num_kv_heads = self.num_queries_per_kv, 1

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return self.layers is None and bool(super().fused_output_quant_supported(quant_key))  # type: ignore[misc]

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        step = None if self.layers is None else _step(get_forward_context().attn_metadata, layer.layer_name)
        if step is not None and step.slots is not None:
            tokens = len(step.slots) // key.shape[1]
            key, value = (x[:tokens].reshape(-1, 1, x.shape[-1]) for x in (key, value))
            slot_mapping = step.slots
        self._write(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attn_metadata is None and self.layers is not None:
            self._reserve(key)
        step = getattr(attn_metadata, "step", None)
        if step is None:
            given = layer, query, key, value, kv_cache, attn_metadata, output
            return super().forward(*given, *args, **kwargs)  # type: ignore[misc]
        if any(scale is not None for scale in (*args, *kwargs.values())):
            raise NotImplementedError("lkv.vllm: expected outputs that are not quantised by the attention kernel")
        self._attend(layer, query, kv_cache, attn_metadata, output)
        if step.ended:
            self._move(layer, key, value, kv_cache, step)
            for ended in step.ended:
                metrics.ROWS.inc(sum(ended.drops) * (self.num_kv_heads // len(ended.drops)))
        if step.replayed is not None:
            tokens, metadata = step.replayed
            again = torch.empty_like(output[tokens])
            self._attend(layer, query[tokens], kv_cache, metadata, again)
            output[tokens] = again
        return output

    def _reserve(self, key: Tensor) -> None:
        """Takes for a moment what an eviction takes beside the pool: vLLM measures how much memory a step needs."""
        return

    @abstractmethod
    def _move(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step) -> None:
        """Moves the kept rows of the step's ended prompts behind `drop`, in their order.

        Args:
            key, value: `[tokens, H, D]`, of the step; they are in `kv_cache` as well.
        """

    def _write(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """vLLM's own update of the cache: rows `[n, H, D]` into slots int64 `[n]`."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slots)  # type: ignore[misc]

    def _attend(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any, output: Tensor) -> None:
        step = metadata.step
        if step.slots is None:
            super().forward(layer, query, None, None, kv_cache, metadata, output)  # type: ignore[misc]
            return
        heads, group = self.num_kv_heads, self.num_queries_per_kv
        tokens = metadata.num_actual_tokens // heads
        apart = query[:tokens].reshape(tokens * heads, group, -1)
        if step.order is not None:
            apart = apart[step.order]
        attended = torch.empty_like(apart)
        kernel: Any = super(Evicts, self.of_head)
        kernel.forward(layer, apart, None, None, kv_cache, metadata, attended)
        together = output[:tokens].view(tokens * heads, group, -1)
        if step.order is None:
            together.copy_(attended)
        else:
            together[step.order] = attended


def _step(metadata: Any, name: str) -> Any:
    own = metadata.get(name) if isinstance(metadata, dict) else metadata
    return getattr(own, "step", None)
