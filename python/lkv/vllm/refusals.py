"""What cannot be evicted stops the start, with what to change."""

from __future__ import annotations

import os
from typing import Any

from lkv.vllm.settings import Settings

TESTED = ("0.32",)
ANY_VERSION = "LKV_VLLM_ANY_VERSION"


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
        "runs on model runner V1: set VLLM_USE_V2_MODEL_RUNNER=0": vllm_config.use_v2_model_runner,
        "shares no prefixes where heads have blocks of their own: add --no-enable-prefix-caching, or set counts to "
        "'equal' or 'layer'": cache.enable_prefix_caching and settings.counts == "head",
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"lkv.vllm {reason}")
    check_platform()


def check_platform() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ValueError(f"lkv.vllm runs on vLLM for CPUs, not for {current_platform.device_name}")


def check_layer(attention: Any) -> None:
    """Raises ValueError for an attention layer that cannot be evicted."""
    refused = {
        "does not evict caches shared between layers (cross-layer KV sharing)": attention.kv_sharing_target_layer_name,
        "does not evict models with ALiBi, as a row's distance is lost": attention.alibi_slopes is not None,
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"lkv.vllm {reason}")
