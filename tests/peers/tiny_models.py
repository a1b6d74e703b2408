"""Small random models of three kinds of attention, for comparisons with kvpress."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, initializer_range=0.3, max_position_embeddings=1024,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "four heads on one": ("Llama", dict(num_attention_heads=4, num_key_value_heads=1, head_dim=8)),
    "norm of keys": ("Qwen3", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)),
    "no groups": ("Llama", dict(num_attention_heads=4, num_key_value_heads=4, head_dim=8)),
}


def build(name: str, vocab_size: int, **more: object) -> PreTrainedModel:
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocab_size, **SMALL, **options, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()
