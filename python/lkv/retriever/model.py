"""The retriever: a Llama of a million parameters that reads the language of `lkv.tasks.Words`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from lkv.tasks import Words

SHORT = 512  # tokens up to which plain matmuls are faster on a CPU than the backward of its flash attention
ATTENTION = "lkv_retriever"


def build(words: Words, seed: int = 0) -> LlamaForCausalLM:
    """4 layers, 8 query heads on 4 KV heads of 32, context 4096, weights drawn from the seed."""
    config = LlamaConfig(
        vocab_size=len(words.vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=words.vocabulary["<pad>"],
        bos_token_id=words.vocabulary["<s>"],
        eos_token_id=words.vocabulary["</s>"],
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention for training: `[B, Hq, n, D]` to `[B, n, Hq, D]`."""
    batch, heads, n, dim = query.shape
    groups = key.shape[1]
    if n > SHORT:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    grouped = (query * scaling).reshape(batch * groups, -1, dim)
    logits = grouped @ key.flatten(0, 1).transpose(1, 2)
    future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    weights = logits.view(-1, heads // groups, n, n).masked_fill(future, -1e4).softmax(-1)
    out = weights.flatten(1, 2) @ value.flatten(0, 1)
    return out.view(batch, heads, n, dim).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)
