"""A decoder of Llama's or Qwen3's kind, to be read: float64, one text, full attention matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """What one layer does with a text of n tokens: Hq query heads, G for each of H KV heads, all float64.

    Attributes:
        queries: `[H, G, n, D]`, keys, values: `[H, n, D]`, after RoPE; queries_before, keys_before: before it.
        attention: `[H, G, n, n]`, what a query (row) pays to a key (column), causal.
        logits: `[H, G, n, n]`, -inf where a query does not see a key; scaling: what they were multiplied by.
        output: `[H, G, hidden, D]`, the output projection of each query head.
        cosine: mean over the tokens of the cosine between the residual stream before and behind the attention.
        frequencies: `[D / 2]`, of RoPE.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    queries_before: Tensor
    keys_before: Tensor
    attention: Tensor
    logits: Tensor
    scaling: float
    output: Tensor
    cosine: float
    frequencies: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[1]


def read(config: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: list[int]) -> list[Layer]:
    """All layers, as they read a text.

    Args:
        config: of transformers. weights: by the names of transformers.
    """
    weights = {name.removeprefix("model."): w.double() for name, w in weights.items()}
    residual, layers = weights["embed_tokens.weight"][tokens], []
    for n in range(config["num_hidden_layers"]):
        own = {name.removeprefix(f"layers.{n}."): w for name, w in weights.items() if name.startswith(f"layers.{n}.")}
        layer, added = _attend(config, own, normed(residual, own["input_layernorm.weight"], config))
        cosine = torch.cosine_similarity(residual, residual + added, dim=-1).mean()
        layers.append(Layer(**layer, cosine=float(cosine)))
        residual = residual + added
        x = normed(residual, own["post_attention_layernorm.weight"], config)
        gate, up = (x @ own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        residual = residual + (gate * gate.sigmoid() * up) @ own["mlp.down_proj.weight"].T
    return layers


def normed(x: Tensor, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def rotated(rows: Tensor, frequencies: Tensor, first: int = 0) -> Tensor:
    """`[..., n, D]` of tokens from position `first` on: pairs (i, i + D / 2) turned by position times frequency."""
    angles = torch.arange(first, first + rows.shape[-2]).double()[:, None] * frequencies
    a, b = rows.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def _attend(config: Mapping[str, Any], own: Mapping[str, Tensor], x: Tensor) -> tuple[dict[str, Any], Tensor]:
    heads, dim, count = config["num_key_value_heads"], config["head_dim"], len(x)
    group = config["num_attention_heads"] // heads
    q = (x @ own["self_attn.q_proj.weight"].T).view(count, heads, group, dim).permute(1, 2, 0, 3)
    k, v = ((x @ own[f"self_attn.{name}_proj.weight"].T).view(count, heads, dim).transpose(0, 1) for name in ("k", "v"))
    if "self_attn.q_norm.weight" in own:
        q, k = (normed(y, own[f"self_attn.{name}_norm.weight"], config) for y, name in ((q, "q"), (k, "k")))
    scaling = dim**-0.5
    stretch = (config.get("rope_scaling") or {}).get("factor", 1.0)
    frequencies = config["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim) / stretch
    queries, keys = rotated(q, frequencies), rotated(k, frequencies)
    logits = queries @ keys[:, None].transpose(-1, -2) * scaling
    logits = logits.masked_fill(torch.ones(count, count).bool().triu(1), -torch.inf)
    attention = logits.softmax(-1)
    output = own["self_attn.o_proj.weight"].view(-1, heads, group, dim).permute(1, 2, 0, 3)
    added = torch.einsum("hgnd,hgxd->nx", attention @ v[:, None], output)
    found = dict(queries=queries, keys=keys, values=v, queries_before=q, keys_before=k, attention=attention)
    return found | dict(logits=logits, scaling=scaling, output=output, frequencies=frequencies), added
