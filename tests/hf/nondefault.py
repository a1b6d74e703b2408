"""A model of which nothing that attention takes from a config is the default, so that whatever is dropped shows.

Gemma 2 with attention of its own: a scale that is not head_dim^-0.5, soft caps, sinks, biases, norms of queries and
keys, rotations by YaRN of half of a head, three query heads for each KV head, heads wider than hidden_size over their
number, values narrower than keys, and a sliding window in every other layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VALUES = 10  # numbers of a value
YARN = dict(
    rope_type="yarn", factor=8.0, rope_theta=10000.0, original_max_position_embeddings=512, partial_rotary_factor=0.5
)
OPTIONS = dict(
    hidden_size=48,
    num_attention_heads=6,
    head_dim=12,
    query_pre_attn_scalar=5,
    attn_logit_softcapping=4.0,
    attention_bias=True,
    rope_scaling=YARN,
    partial_rotary_factor=0.5,
    tie_word_embeddings=False,  # or every token would say itself
    attn_implementation="eager",
)


class Attention(nn.Module):
    def __init__(self, config: Gemma2Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.scaling, self.softcap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * VALUES)
        self.o_proj = nn.Linear(self.heads * VALUES, config.hidden_size)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, eps=1e-6) for _ in range(2))
        self.sinks = nn.Parameter(torch.empty(self.heads))

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, cache=None, **rest
    ):
        cache = past_key_values if cache is None else cache
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, dim))
            for projection, dim in ((self.q_proj, self.head_dim), (self.k_proj, self.head_dim), (self.v_proj, VALUES))
        )
        query, key, value = (t.transpose(1, 2) for t in (self.q_norm(query), self.k_norm(key), value))
        query, key = rotated(query, *position_embeddings), rotated(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        settings = dict(scaling=self.scaling, softcap=self.softcap, s_aux=self.sinks)
        out, weights = attend(
            self, query, key, value, attention_mask, sliding_window=self.sliding_window, **settings, **rest
        )
        return self.o_proj(out.flatten(2)), weights


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin, width = cos[:, None], sin[:, None], cos.shape[-1]
    first, second = x[..., :width].chunk(2, -1)
    turned = x[..., :width] * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, x[..., width:]], -1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, softcap, s_aux, **kwargs):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if attention_mask is not None:
        logits = logits + attention_mask
    logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2), weights


class NondefaultForCausalLM(Gemma2ForCausalLM):
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = Attention(config, index)
            for name, parameter in layer.self_attn.named_parameters():
                with torch.no_grad():  # norms about 1, all else as wide as the weights of other families
                    parameter.normal_(float(name.endswith("norm.weight")), config.initializer_range)
                    if name == "sinks":
                        parameter.add_(1.0)
