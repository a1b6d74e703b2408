"""The model of the demo: a Llama built on the spot, and the attention functions it is run with.

transformers looks attention up by name and hands it the keyword arguments of the model's call. So each request brings
its own state along (`observed`, `ragged`, `kept`), and the functions here hold none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lkv_ext import RaggedKV

PREFILL, RAGGED, MASKED = "lkv_demo_prefill", "lkv_demo_ragged", "lkv_demo_masked"


def build_model(layers: int, max_tokens: int, seed: int, device: torch.device) -> LlamaForCausalLM:
    """A Llama with random weights over bytes: 16 query heads on 8 KV heads of 64, float32, nothing downloaded."""
    AttentionInterface.register(PREFILL, prefill_attention)
    AttentionInterface.register(RAGGED, ragged_attention)
    AttentionInterface.register(MASKED, masked_attention)
    # Names without a mask function get no mask: right for one query, while prefill needs the causal one.
    AttentionMaskInterface.register(PREFILL, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=max_tokens,
        attn_implementation=PREFILL,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    # Nobody trained this model: as initialised, its attention is all but uniform and every head wins the same budget.
    # Keys scaled by 2 to 16, head by head, make heads sharp and flat as trained ones are, though without any meaning.
    for layer in model.model.layers:
        heads = layer.self_attn.k_proj.weight.data.view(config.num_key_value_heads, -1)
        heads *= torch.rand(heads.shape[0], 1).mul(3).add(1).exp2()
    return model.to(device).eval()


def prefill_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    observed: list[Tensor] | None = None,
    window: int = 0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' own attention; where a list is given, it also collects the scores of every layer's keys."""
    if observed is not None:
        observed.append(window_scores(query[:, :, -window:], key, scaling))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def window_scores(queries: Tensor, keys: Tensor, scaling: float, pool: int = 7) -> Tensor:
    """Scores `[B, H, L]` as in SnapKV (arXiv 2404.14469): what the last queries attend to, smoothed along the tokens.

    Args:
        queries: the last w of the prompt, `[B, Hq, w, D]`.
        keys: all of the prompt, `[B, H, L, D]`; the Hq / H query heads of a group are summed.
    """
    batch, heads, length, dim = keys.shape
    window = queries.shape[2]
    logits = queries.reshape(batch, heads, -1, dim) @ keys.transpose(2, 3) * scaling
    future = torch.ones(window, length, dtype=torch.bool, device=keys.device).triu(length - window + 1)
    logits = logits.view(batch, heads, -1, window, length).masked_fill(future, -torch.inf)
    attention = logits.softmax(-1, dtype=torch.float32).sum((2, 3))
    return F.avg_pool1d(attention, pool, stride=1, padding=pool // 2)


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    ragged: RaggedKV,
    position: int,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """One new token against what the eviction left of its layer: every KV head has its own number of rows.

    Args:
        query: `[B, Hq, 1, D]`.
        key, value: of the new token alone, `[B, H, 1, D]`, at its logical position: rows keep the rotation that they
            were cached with, wherever they lie now.
    """
    layer = ragged.layer(module.layer_idx)
    append(layer, key, value, position)
    batch, heads = key.shape[:2]
    groups = query.view(batch * heads, -1, query.shape[-1])
    # Head by head to be readable. An engine passes cu_seqlens and lengths to its varlen kernel, and never to the host.
    begins, lengths = layer.cu_seqlens[:-1].tolist(), layer.lengths.flatten().tolist()
    attended = []
    for group, begin, length in zip(groups, begins, lengths, strict=True):
        rows = slice(begin, begin + length)
        weights = (group @ layer.k[rows].T * scaling).softmax(-1)
        attended.append(weights @ layer.v[rows])
    return torch.stack(attended).view(batch, 1, -1, value.shape[-1]), None


def append(layer: RaggedKV, key: Tensor, value: Tensor, position: int) -> None:
    """Writes one token behind the rows of every head, in place: `reserve` has left room for it."""
    slots = layer.cu_seqlens[:-1] + layer.lengths.flatten()
    layer.k[slots] = key.flatten(0, 2)
    layer.v[slots] = value.flatten(0, 2)
    layer.positions[slots] = position
    layer.lengths += 1


def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    kept: Tensor,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The same token against the whole cache, evicted positions masked: eviction as it is usually simulated.

    Args:
        key, value: the prompt and the new token, `[B, H, L + 1, D]`.
        kept: bool `[N, B, H, L]`, of the prompt.
    """
    visible = F.pad(kept[module.layer_idx], (0, 1), value=True)
    mask = visible.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2).contiguous(), None
