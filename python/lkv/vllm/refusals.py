"""What cannot be evicted stops the start, with what to change."""

from __future__ import annotations

import os
from typing import Any

import torch

import lkv_ext
from lkv.vllm.settings import Settings

TESTED = ("0.32",)
ANY_VERSION = "LKV_VLLM_ANY_VERSION"
GPU = "LKV_VLLM_GPU"
GPU_BACKENDS = ("FLASH_ATTN", "FLASHINFER")


def check(vllm_config: Any, settings: Settings) -> None:
    """Raises ValueError for an engine that cannot evict."""
    from vllm import __version__

    version = ".".join(__version__.split(".")[:2])
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    scheduler, heads = vllm_config.scheduler_config, model.get_total_num_kv_heads()
    refused = {
        f"runs on vLLM {', '.join(TESTED)}, not {__version__}: install that, or set {ANY_VERSION}=1 to try it": (
            version not in TESTED and os.environ.get(ANY_VERSION) != "1"
        ),
        "does not evict latent caches (MLA): start without lkv settings": model.use_mla,
        "does not evict under speculative decoding: remove --speculative-config": vllm_config.speculative_config,
        "does not evict with a KV connector or offloading: remove --kv-transfer-config": vllm_config.kv_transfer_config,
        "does not evict under context parallelism: remove --decode-context-parallel-size and "
        "--prefill-context-parallel-size": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "does not evict under pipeline parallelism: remove --pipeline-parallel-size": parallel.pipeline_parallel_size
        > 1,
        f"does not evict KV heads that several ranks hold: set --tensor-parallel-size to at most {heads}": (
            parallel.tensor_parallel_size > heads
        ),
        "does not evict under data parallelism: start an engine for each replica": parallel.data_parallel_size > 1,
        "does not evict a quantised KV cache: remove --kv-cache-dtype": (
            cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32")
        ),
        "does not evict a model whose prompt attends in both directions (prefix LM)": model.is_mm_prefix_lm,
        "does not evict encoder-decoder models": model.is_encoder_decoder,
        "does not evict hybrid models (Mamba, linear attention)": model.is_hybrid or model.has_inner_state,
        "does not evict multimodal models": model.is_multimodal_model,
        "evicts for generation only: remove --runner": model.runner_type != "generate",
        "does not evict prompts of embeddings: remove --enable-prompt-embeds": model.enable_prompt_embeds,
        "does not evict in micro-batches: remove --enable-dbo": parallel.use_ubatching,
        "does not evict caches shared between layers: remove --kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "needs the hybrid KV cache manager: remove --disable-hybrid-kv-cache-manager": (
            scheduler.disable_hybrid_kv_cache_manager
        ),
        "runs on model runner V1, as V2 has built its attention before it makes what tells a plug-in of the batch: set "
        "VLLM_USE_V2_MODEL_RUNNER=0": vllm_config.use_v2_model_runner,
        "shares no prefixes where heads have blocks of their own: add --no-enable-prefix-caching, or set counts to "
        "'equal' or 'layer'": cache.enable_prefix_caching and settings.counts == "head",
    }
    _raise_first(refused)
    check_platform(vllm_config, settings)


def check_platform(vllm_config: Any, settings: Settings) -> None:
    """Raises ValueError for a device other than CPUs and, where that is asked for, NVIDIA GPUs."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    if not current_platform.is_cuda():
        raise ValueError(f"lkv.vllm runs on vLLM for CPUs and NVIDIA GPUs, not for {current_platform.device_name}")
    check_gpu(vllm_config, settings)


def check_gpu(vllm_config: Any, settings: Settings) -> None:
    """Raises ValueError for an engine on a GPU that cannot evict; warns of one that can."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.config import CUDAGraphMode
    from vllm.logger import init_logger

    attention, compilation = vllm_config.attention_config, vllm_config.compilation_config
    backends = [attention.backend, attention.backend_per_kind.get("full_attention")]
    names = [backend.name for backend in backends if backend is not None and backend.name not in GPU_BACKENDS]
    graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    _raise_first(
        {
            f"was checked with stand-ins for the kernels of GPUs, not run on a GPU: set {GPU}=1 to try it, and compare "
            "its answers": os.environ.get(GPU) != "1",
            "needs lkv_ext with kernels for GPUs: build it with LKV_CUDA=ON": (
                lkv_ext.build_info()["cuda_compiler"] is None
            ),
            f"evicts on GPUs with the backends {' and '.join(GPU_BACKENDS)}, not {', '.join(names)}: set "
            "--attention-backend to one of them": names,
            f"evicts float16 and bfloat16 on GPUs, not {vllm_config.model_config.dtype}: set --dtype": (
                vllm_config.model_config.dtype not in (torch.float16, torch.bfloat16)
            ),
            "writes rows of heads outside of CUDA graphs: add --enforce-eager, or set counts to 'equal' or 'layer'": (
                settings.counts == "head"
                and graphs
                and (is_breakable_cudagraph_enabled() or not compilation.splitting_ops_contain_kv_cache_update())
            ),
        }
    )
    init_logger("vllm.lkv").warning(
        "lkv.vllm on a GPU was checked with stand-ins for the attention kernels, not run on a GPU: compare its answers "
        "with those of an engine without it. CUDA graphs are piecewise, as rows move between them."
    )


def check_layer(attention: Any, settings: Settings) -> None:
    """Raises ValueError for an attention layer that cannot be evicted."""
    _raise_first(
        {
            "does not evict caches shared between layers (cross-layer KV sharing)": (
                attention.kv_sharing_target_layer_name
            ),
            "does not evict models with ALiBi, as a row's distance is lost": attention.alibi_slopes is not None,
            "has no attention sinks where heads have blocks of their own: set counts to 'equal' or 'layer'": (
                settings.counts == "head" and getattr(attention, "sinks", None) is not None
            ),
        }
    )


def _raise_first(refused: dict[str, Any]) -> None:
    """Raises ValueError for the first reason that applies."""
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"lkv.vllm {reason}")
