"""Models of every family that `lkv.Cache` is tested with: a few layers, random weights, nothing downloaded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from functools import cache

import nondefault
import torch
import transformers
from torch import Tensor

VOCABULARY = 64
HEADS = 2  # KV heads
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    max_position_embeddings=4096,
    initializer_range=0.3,  # as initialised, attention would be all but uniform, and evicting would change nothing
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
SLIDING = dict(num_hidden_layers=4, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2)
FAMILIES = {
    "llama": ("Llama", "LlamaConfig", dict(head_dim=8)),
    "mistral": ("Mistral", "MistralConfig", dict(head_dim=8, sliding_window=None)),
    "qwen2": ("Qwen2", "Qwen2Config", {}),
    "qwen3": ("Qwen3", "Qwen3Config", dict(head_dim=8)),
    "phi3": ("Phi3", "Phi3Config", {}),
    "gemma2": (
        "Gemma2",
        "Gemma2Config",
        dict(head_dim=8, query_pre_attn_scalar=8, attn_implementation="eager", **SLIDING),
    ),
    "gemma3": ("Gemma3", "Gemma3TextConfig", dict(head_dim=8, query_pre_attn_scalar=8, **SLIDING)),
    "nondefault": ("Nondefault", "Gemma2Config", {**nondefault.OPTIONS, **SLIDING}),
}
# Windows and recurrent states count padding that comes between tokens: these have none.
WITHOUT_WINDOWS = {name: family for name, family in FAMILIES.items() if "sliding_window" not in family[2]} | {
    "mistral": FAMILIES["mistral"],
    "nondefault, full": ("Nondefault", "Gemma2Config", {**nondefault.OPTIONS, "layer_types": ["full_attention"] * 2}),
}
# Models with something special: layers without keys of their own, sinks, a recurrent state, experts, a wrapper.
# Whole conversations with them are in test_families.py alone.
SHARING = dict(
    head_dim=8, num_kv_shared_layers=2, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, **SLIDING
)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
HYBRID = dict(num_hidden_layers=4, head_dim=8, layer_types=["linear_attention", "full_attention"] * 2, **LINEAR)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
ALTUP = dict(laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4, intermediate_size=[48] * 4)
MAMBA = dict(use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4)
SPECIAL = {
    "gemma3n": ("Gemma3n", "Gemma3nTextConfig", {**SHARING, **ALTUP}),
    "gemma4": ("Gemma4", "Gemma4TextConfig", {**SHARING, "global_head_dim": 16}),
    "gpt_oss": ("GptOss", "GptOssConfig", dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, **SLIDING)),
    "qwen3_next": ("Qwen3Next", "Qwen3NextConfig", {**HYBRID, **EXPERTS}),
    "qwen3_5": ("Qwen3_5", "Qwen3_5TextConfig", HYBRID),
    "jamba": (
        "Jamba",
        "JambaConfig",
        dict(
            num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_offset=1, num_experts=2, **MAMBA
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        "NemotronHConfig",
        dict(
            hybrid_override_pattern="M*M*",
            head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=4,
            n_groups=1,
        ),
    ),
    "stablelm": ("StableLm", "StableLmConfig", {}),
    "mixtral": ("Mixtral", "MixtralConfig", dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(num_attention_heads=HEADS)),
}


def selected(families: Iterable[str]) -> list[str]:
    """Those that tests go through: with an older transformers llama stands for what is like it."""
    alike = ("mistral", "qwen2", "qwen3") if os.environ.get("LKV_FEWER_FAMILIES") else ()
    return [name for name in families if name not in alike]


@cache
def build(family: str) -> transformers.PreTrainedModel:
    model = variant(family)
    model.generation_config.eos_token_id = None
    return model


def variant(family: str, **options: object) -> transformers.PreTrainedModel:
    """With other options of its config."""
    name, config, own = {**FAMILIES, **WITHOUT_WINDOWS, **SPECIAL}[family]
    torch.manual_seed(0)
    kind = name if name.endswith("Model") else f"{name}ForCausalLM"
    made = getattr(nondefault if name == "Nondefault" else transformers, kind)
    return made(getattr(transformers, config)(**{**SMALL, **own, **options})).eval()


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def call(model: transformers.PreTrainedModel, ids: Tensor, mask: Tensor | None, cache: object) -> Tensor:
    """Logits `[B, n, V]` of n more tokens; `mask` `[B, L]` is of all tokens so far."""
    name = "cache" if "cache" in inspect.signature(type(model.get_decoder()).forward).parameters else "past_key_values"
    positions = {} if mask is None else dict(position_ids=places(mask)[:, -ids.shape[1] :])
    return model(ids, attention_mask=mask, use_cache=True, **{name: cache}, **positions).logits


def places(mask: Tensor) -> Tensor:
    """Positions `[B, L]` of tokens of which some are padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)
