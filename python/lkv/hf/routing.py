"""Sends a model's attention through `lkv.hf.attention` while some cache of it is alive, and back afterwards.

transformers looks attention and mask functions up by the name in a config. For every attention that a model may have
of its own there is one name of ours, `lkv_sdpa` for `sdpa`; its functions call the model's own ones wherever the cache
in use is not ours, so that the name may stay while other caches are used beside.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lkv.hf.attention import make_attention

PREFIX = "lkv_"
_lock = threading.Lock()
_routes: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()


class Route:
    """The configs of one decoder, switched while `users` > 0."""

    def __init__(self, configs: list[PretrainedConfig]) -> None:
        self.configs = configs
        self.own: list[str] = []
        self.users = 0

    def acquire(self) -> None:
        with _lock:
            if self.users == 0:
                self.own = [config._attn_implementation.removeprefix(PREFIX) for config in self.configs]
                names = [_register(own) for own in self.own]
                for config, name in zip(self.configs, names, strict=True):
                    config._attn_implementation = name
            self.users += 1

    def release(self) -> None:
        with _lock:
            self.users -= 1
            if self.users == 0:
                for config, own in zip(self.configs, self.own, strict=True):
                    # Whoever has chosen another attention in the meantime keeps it.
                    if config._attn_implementation == PREFIX + own:
                        config._attn_implementation = own


def route(model: PreTrainedModel) -> tuple[PretrainedConfig, Route]:
    """The config of a model's decoder, and the way there and back.

    Raises:
        TypeError, ValueError: where the attention of the model cannot be routed.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"lkv.Cache: expected a transformers model, got {type(model).__name__}")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or not decoder._supports_attention_backend:
        raise ValueError(
            "lkv.Cache: expected a decoder whose attention goes through transformers' AttentionInterface, "
            f"got {type(model).__name__}"
        )
    with _lock:
        if decoder not in _routes:
            layers = [m.config for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
            _routes[decoder] = Route(list({id(config): config for config in [decoder.config, *layers]}.values()))
        return decoder.config, _routes[decoder]


def _register(own: str) -> str:
    name = PREFIX + own
    has_attention = own == "eager" or own in ALL_ATTENTION_FUNCTIONS
    if own not in ALL_MASK_ATTENTION_FUNCTIONS or not has_attention or own.startswith(("flex", "paged")):
        raise ValueError(f"lkv.Cache: expected a model with eager, sdpa or flash attention, got {own!r}")
    AttentionInterface.register(name, make_attention(own))
    # The sizes that the cache reports make it the mask of the tokens that the model's own attention sees, or, when the
    # rows are ours, of the new tokens among themselves: that tells which of them are padding.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    return name
