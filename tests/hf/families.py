"""Models of every family that `lkv.Cache` is tested with: a few layers, random weights, nothing downloaded."""

from __future__ import annotations

import inspect
from functools import cache

import torch
import transformers
from torch import Tensor

VOCABULARY = 64
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
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
}


@cache
def build(family: str) -> transformers.PreTrainedModel:
    name, config, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**{**SMALL, **options})).eval()
    model.generation_config.eos_token_id = None
    return model


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
