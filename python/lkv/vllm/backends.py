"""Puts our attention in the place of vLLM's, in a worker that evicts, before it builds its model."""

from __future__ import annotations

from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

CPU = {AttentionBackendEnum.CPU_ATTN: "lkv.vllm.cpu.Backend"}
GPU = {
    AttentionBackendEnum.FLASH_ATTN: "lkv.vllm.flash_attn.Backend",
    AttentionBackendEnum.FLASHINFER: "lkv.vllm.flashinfer.Backend",
}


def install() -> None:
    for backend, path in (CPU if current_platform.is_cpu() else GPU).items():
        register_backend(backend, path)
    selector._cached_get_attn_backend.cache_clear()  # where this process has had another engine
