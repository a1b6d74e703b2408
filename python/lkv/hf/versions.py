"""What differs between the versions of transformers that `lkv.hf` runs on, 4.56 to today's.

- `Cache.get_mask_sizes` gets the positions of the new tokens (until 5.5) or how many there are.
- `CacheLayerMixin.lazy_initialization` gets keys (4.56) or keys and values, `update` a dictionary or keywords.
- `get_max_cache_shape` became `get_max_length`; models call their cache `past_key_values` or `cache`.
- `crop` gets the length to keep, or minus the tokens to drop; today's layers take only the latter.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache as HFCache
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


def new_tokens(query: int | Tensor) -> int:
    """From what `get_mask_sizes` was given."""
    return query.shape[0] if isinstance(query, Tensor) else query


def tokens_to_drop(argument: int, length: int) -> int:
    """From what `crop` was given, of a cache of this logical length."""
    return -argument if argument < 0 else max(length - argument, 0) if argument > 0 else 0


def own_layers(config: PretrainedConfig) -> list[CacheLayerMixin]:
    """The layers that transformers would make for a decoder's config: full attention, sliding window and so on."""
    return DynamicCache(config=config).layers


def is_full_attention(layer: CacheLayerMixin) -> bool:
    """Whether it is one that grows with the text and holds keys and values, nothing else."""
    return type(layer) is DynamicLayer


def is_appended_by_copy(layer: CacheLayerMixin) -> bool:
    """Whether new tokens make new tensors, so that whoever holds the old ones still has what was there."""
    return isinstance(layer, DynamicLayer)


__all__ = [
    "CacheLayerMixin",
    "HFCache",
    "is_appended_by_copy",
    "is_full_attention",
    "new_tokens",
    "own_layers",
    "tokens_to_drop",
]
