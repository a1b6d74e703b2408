"""The attention function of a model that `lkv.Cache` is used with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# (module, query, key, value, mask, **kwargs) -> ([B, n, Hq, D], weights or None)
Attention = Callable[..., tuple[Tensor, Tensor | None]]

LAYER = "_lkv_layer"  # on the keys that a layer of ours hands to the model: which layer that is

# What models pass along for others to read, or to say what holds here anyway.
_HARMLESS = frozenset(
    {"cache_position", "position_ids", "use_cache", "past_key_values", "cache", "num_items_in_batch", "logits_to_keep"}
    | {"return_dict", "output_hidden_states", "token_type_ids", "mm_token_type_ids", "kwargs"}
)


def make_attention(own: str) -> Attention:
    """The function that stands for the attention `own` of a model, and is that attention for all caches but ours."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        layer = getattr(key, LAYER, None)
        if layer is None:
            return own_attention(own, module)(module, query, key, value, attention_mask, **kwargs)
        return layer.attend(own, module, query, key, value, attention_mask, **kwargs)

    # Rows of a number that only the cache knows: the compiled graph is left for the call, and goes on behind it.
    return torch.compiler.disable(attention)


def own_attention(own: str, module: nn.Module) -> Attention:
    """`own` by name; eager attention is a function of the file that the model lives in."""
    if own != "eager":
        return ALL_ATTENTION_FUNCTIONS[own]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(f"lkv.Cache: expected a model with an eager_attention_forward, got {type(module).__name__}")
    return eager


def softcap_of(own: str, kwargs: dict[str, object]) -> float | None:
    """The cap of the logits that the model's own attention applies: transformers' sdpa leaves it out."""
    return None if own == "sdpa" else kwargs.get("softcap")


def check_arguments(module: nn.Module, kwargs: dict[str, object]) -> None:
    """Refuses what attention over the rows of a cache would have to do otherwise.

    Raises:
        ValueError: for a sliding window, dropout, attention sinks, weights as output, and arguments that nobody knows.
    """
    if kwargs.get("dropout"):
        raise ValueError("lkv.Cache: expected a model in eval mode, got one with dropout")
    if kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"lkv.Cache: expected full attention in layer {module.layer_idx}, got a sliding window of "
            f"{kwargs['sliding_window']}"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("lkv.Cache: expected causal attention, got is_causal=False")
    known = _HARMLESS | {"dropout", "scaling", "softcap", "sliding_window", "is_causal"}
    other = [name for name, value in kwargs.items() if name not in known and value is not None and value is not False]
    if other:
        raise ValueError(f"lkv.Cache: expected attention without {', '.join(sorted(other))}")


@dataclass(frozen=True)
class Real:
    """Which of the new tokens of a call are no padding, where some are.

    Attributes:
        counts: per sequence.
        order: int64 `[B, n]`, the tokens with padding first and all else as it was; None: so they came.
    """

    counts: list[int]
    order: Tensor | None


def real_tokens(mask: Tensor | None, batch: int, count: int) -> Real | None:
    """What a mask says of the last `count` tokens; None: they are all real.

    Args:
        mask: what the model's own mask function made: `[B, 1, n, L]`, bool or additive, or `[B, L]`.

    Raises:
        TypeError: for a mask of another kind.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise TypeError(f"lkv.Cache: expected a mask [B, L] or [B, 1, n, L], got {type(mask).__name__}")
    seen = mask if mask.dim() == 2 else mask[:, 0, -1]
    seen = seen[:, -count:]
    real = (seen == 0 if seen.is_floating_point() else seen != 0).expand(batch, -1)
    counts = real.sum(1)
    in_order = (real == (torch.arange(count, device=real.device) >= count - counts[:, None])).all()
    *counts, in_order = torch.cat([counts, in_order[None]]).tolist()  # one synchronisation on CUDA
    if all(n == count for n in counts):
        return None
    return Real(counts, None if in_order else real.byte().argsort(dim=1, stable=True))
