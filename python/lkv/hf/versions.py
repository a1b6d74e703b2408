"""What differs between the versions of transformers that `lkv.hf` runs on, 4.56 to today's.

- `Cache.get_mask_sizes` gets the positions of the new tokens (until 5.5) or how many there are.
- `CacheLayerMixin.lazy_initialization` gets keys (4.56) or keys and values, `update` a dictionary or keywords.
- `get_max_cache_shape` became `get_max_length`; models call their cache `past_key_values` or `cache`.
- `crop` gets the length to keep, or minus the tokens to drop; today's layers take only the latter.
- Layers of a recurrent state, and such as hold nothing, are cache layers in today's versions only.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache as HFCache
from transformers import DynamicCache, PretrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

RecurrentLayer: type | None = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
if TYPE_CHECKING:
    from transformers.cache_utils import DummyLayer, LinearAttentionCacheLayerMixin

    HFLayer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer
else:
    HFLayer = CacheLayerMixin  # the others are not there in every version
P = ParamSpec("P")
T = TypeVar("T")
CACHE_ARGUMENTS = ("past_key_values", "cache")  # of a model's forward


class AttentionModule(Protocol):
    """A module of a model that attends, as it comes to hooks and attention functions."""

    @property
    def layer_idx(self) -> int: ...


def output_projection(module: object) -> Tensor | None:
    """The weight `[hidden, Hq * Dv]` of the projection behind the attention of a module; None: it is no plain one."""
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() else None


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """A compiled model leaves its graph for the call and resumes after it."""
    reason = "lkv.Cache holds rows of a number that only it knows: compile without fullgraph=True"
    return torch.compiler.disable(function, reason=reason)


def new_tokens(query: int | Tensor) -> int:
    """From what `get_mask_sizes` was given."""
    return query.shape[0] if isinstance(query, Tensor) else query


def tokens_to_drop(argument: int, length: int) -> int:
    """From what `crop` was given, of a cache of this logical length."""
    return -argument if argument < 0 else max(length - argument, 0) if argument > 0 else 0


def own_layers(config: PretrainedConfig) -> list[HFLayer]:
    """The layers that transformers would make for a decoder's config: full attention, sliding window and so on."""
    return DynamicCache(config=config).layers


def is_full_attention(layer: HFLayer) -> bool:
    """Whether it is one that grows with the text and holds keys and values, nothing else."""
    return type(layer) is DynamicLayer


def is_appended_by_copy(layer: HFLayer) -> TypeGuard[DynamicLayer]:
    """Whether new tokens make new tensors, so that the old ones still hold the earlier tokens."""
    return isinstance(layer, DynamicLayer) and not is_recurrent(layer)


def is_recurrent(layer: object) -> bool:
    """Whether it holds a state that new tokens overwrite."""
    return RecurrentLayer is not None and isinstance(layer, RecurrentLayer)


def stage_of_generate() -> str | None:
    """What `generate` is about when it calls the model: "prompt", "first draft", "draft", "answer"; None outside of it.

    A last chunk of one token and a token that was generated look alike, and so do a prompt and a draft that is to be
    verified (prompt lookup, assisted decoding), of which the first comes behind the prompt in one call. transformers
    tells a cache none of it; only its stack does.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils":
            stage = _STAGES.get(frame.f_code.co_name)
            if stage == "draft" and frame.f_locals.get("is_first_iteration"):
                return "first draft"
            if stage is not None:
                return stage
        frame = frame.f_back
    return None


_STAGES = {
    "_prefill": "prompt",
    "_prefill_chunking": "prompt",
    "_assisted_decoding": "draft",
    "generate": "answer",
}


__all__ = [
    "CACHE_ARGUMENTS",
    "AttentionModule",
    "CacheLayerMixin",
    "HFCache",
    "HFLayer",
    "RecurrentLayer",
    "is_appended_by_copy",
    "is_full_attention",
    "is_recurrent",
    "new_tokens",
    "output_projection",
    "outside_graphs",
    "own_layers",
    "stage_of_generate",
    "tokens_to_drop",
]


def with_cache(decoder: nn.Module, cache: HFCache) -> dict[str, object]:
    """The keyword arguments by which the forward of a decoder is given its cache."""
    known = inspect.signature(type(decoder).forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
