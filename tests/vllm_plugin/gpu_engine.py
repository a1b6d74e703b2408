"""Engines of the CPU build whose attention is a backend for GPUs, on stand-ins for its kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import engine
from stand_ins import CALLS, FlashAttention, FlashInfer
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from lkv.vllm import backends

LAYOUTS = {"NHD": "LBNHC", "HND": "LBHNC"}
# By name: the backend, its kernels, and the order in which they have pools.
KERNELS: dict[str, tuple[str, Any, str]] = {
    "flash_attn-NHD": ("lkv.vllm.flash_attn.Backend", FlashAttention(), "NHD"),
    "flash_attn-HND": ("lkv.vllm.flash_attn.Backend", FlashAttention(), "HND"),
    "flashinfer-NHD": ("lkv.vllm.flashinfer.Backend", FlashInfer("native"), "NHD"),
    "flashinfer-HND": ("lkv.vllm.flashinfer.Backend", FlashInfer("native"), "HND"),
    "xqa-NHD": ("lkv.vllm.flashinfer.Backend", FlashInfer("xqa"), "NHD"),
    "trtllm-HND": ("lkv.vllm.flashinfer.Backend", FlashInfer("trtllm"), "HND"),
}


@contextlib.contextmanager
def gpu_engine(name: str, folder: Path, settings: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """`engine.engine`, with CPU_ATTN replaced by the backend `name` of `KERNELS`; what ran is in `CALLS`."""
    path, kernels, order = KERNELS[name]
    CALLS.clear()
    with kernels(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "CPU", {AttentionBackendEnum.CPU_ATTN: path})
        patch.setenv("VLLM_KV_CACHE_LAYOUT", LAYOUTS[order])
        with engine(folder, settings, **options) as llm:
            yield llm
