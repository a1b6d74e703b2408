"""Models of full attention whose logits are not those of a Llama: each differs in a setting of its own."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FULL = dict(head_dim=8, layer_types=["full_attention"] * 2)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
YARN = dict(rope_type="yarn", factor=8.0, rope_theta=10000.0, original_max_position_embeddings=512)
MODELS = {
    "one head": ("Llama", dict(head_dim=8, hidden_size=24, num_attention_heads=3, num_key_value_heads=1)),
    "no groups": ("Llama", dict(head_dim=8, num_key_value_heads=4)),
    "scaled rotations": ("Llama", dict(head_dim=8, rope_scaling=YARN)),
    "part of a head rotated": ("Phi3", dict(hidden_size=64, partial_rotary_factor=0.5)),
    "norm of keys": ("Qwen3", dict(head_dim=8)),
    "scale": ("Granite", dict(attention_multiplier=0.7)),
    "scale and soft cap": ("Gemma2", dict(query_pre_attn_scalar=3, attn_logit_softcapping=1.5, **FULL)),
    "sinks": ("GptOss", {**EXPERTS, **FULL}),
}


@cache
def build(name: str) -> PreTrainedModel:
    """With eager attention, whose weights the model gives away."""
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options}, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "sinks"):
            torch.nn.init.normal_(layer.self_attn.sinks, 1, 2)
    return model


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (batch, count), generator=torch.Generator().manual_seed(seed))
