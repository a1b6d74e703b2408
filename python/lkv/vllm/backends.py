"""Puts our attention in the place of vLLM's, in a worker that evicts, before it builds its model."""

from __future__ import annotations

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def install() -> None:
    register_backend(AttentionBackendEnum.CPU_ATTN, "lkv.vllm.cpu.Backend")
    selector._cached_get_attn_backend.cache_clear()  # where this process has had another engine
