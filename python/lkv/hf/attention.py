"""The attention function of a model while it runs with `lkv.Cache`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lkv.hf.versions import AttentionModule, outside_graphs

# (module, query, key, value, mask, **kwargs) -> ([B, n, Hq, D], weights or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]

NOTE = "_lkv_note"  # on the keys that a layer of ours hands to the model: the cache and the layer that they are of
Logits = tuple[float, float | None, Tensor | None]  # scale, soft cap, and sinks [Hq]

# What models pass along for others to read, or to say what holds here anyway.
_HARMLESS = frozenset(
    {"cache_position", "position_ids", "use_cache", "past_key_values", "cache", "num_items_in_batch", "logits_to_keep"}
    | {
        "return_dict",
        "output_hidden_states",
        "token_type_ids",
        "mm_token_type_ids",
        "kwargs",
        "return_shared_kv_states",
    }
)
_KNOWN = frozenset({"dropout", "scaling", "softcap", "sliding_window", "is_causal", "s_aux"})


def make_attention(own: str) -> Attention:
    """The function that stands for the attention `own` of a model, and is that attention for all caches but ours."""

    def attention(
        module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        note = getattr(key, NOTE, None)
        if note is None:
            return own_attention(own, module, query, key, value, attention_mask, **kwargs)
        cache, layer = note
        return cache.attend(layer, own, module, (query, key, value), attention_mask, kwargs)

    return outside_graphs(attention)


def own_attention(
    own: str, module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention `own`, by name, of a module; eager attention is a function of the file that the model lives in."""
    count, total = query.shape[2], key.shape[2]
    if own == "sdpa" and mask is None and 1 < count < total and getattr(module, "is_causal", True):
        # Models that ask for the last logits alone drop queries where they share keys, but not where they know that
        # sdpa would take the first of the keys for those of the queries; it is not to them that sdpa runs here.
        place = torch.arange(total, device=query.device)
        mask = (place <= place[total - count :, None])[None, None]
    if own != "eager":
        return ALL_ATTENTION_FUNCTIONS[own](module, query, key, value, mask, **kwargs)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(f"lkv.Cache: expected a model with an eager_attention_forward, got {type(module).__name__}")
    return eager(module, query, key, value, mask, **kwargs)


def logits_of(own: str, query: Tensor, kwargs: dict[str, Any]) -> Logits:
    """Scale, soft cap and sinks `[Hq]` of the logits in a model's own attention: transformers' sdpa has the first."""
    scaling = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return (scale, None, None) if own == "sdpa" else (scale, kwargs.get("softcap"), kwargs.get("s_aux"))


def check_arguments(module: AttentionModule, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuses what attention over the rows of a cache would have to do otherwise.

    Raises:
        ValueError: for a sliding window, dropout, weights as output, and unknown arguments.
    """
    if kwargs.get("dropout"):
        raise ValueError("lkv.Cache: expected a model in eval mode, got one with dropout: call model.eval()")
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"lkv.Cache: expected full attention in layer {module.layer_idx}, got a sliding window of "
            f"{kwargs['sliding_window']}"
        )
    if kwargs.get("is_causal") is False and mask is None and query.shape[2] > 1:
        raise ValueError("lkv.Cache: expected causal attention, got is_causal=False")
    if kwargs.keys() <= _EVERYDAY:
        return
    other = [
        name
        for name, value in kwargs.items()
        if name not in _HARMLESS and name not in _KNOWN and value is not None and value is not False
    ]
    if "output_attentions" in other:
        raise ValueError(
            "lkv.Cache: expected attention without output_attentions: every head has rows of its own, and no "
            "matrix holds their weights: use transformers' own cache to see them"
        )
    if other:
        raise ValueError(f"lkv.Cache: expected attention without {', '.join(sorted(other))}")


_EVERYDAY = _KNOWN | {"position_ids", "cache_position", "use_cache"}
