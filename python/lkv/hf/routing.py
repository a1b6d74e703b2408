"""Sends a model's attention through `lkv.hf.attention` while some cache of it is alive, and back afterwards.

transformers looks attention and mask functions up by the name in a config. For every attention that a model may have
of its own there is one name of ours, `lkv_sdpa` for `sdpa`; its functions call the model's own ones wherever the cache
in use is not ours, so that the name may stay while other caches are used beside.
"""

from __future__ import annotations

import threading
import weakref
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lkv.hf.attention import make_attention
from lkv.hf.capture import install

PREFIX = "lkv_"
_lock = threading.Lock()
_routes: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()


class Route:
    """The configs of one decoder, switched while `users` > 0, and hooks on its modules while `observers` > 0."""

    def __init__(self, decoder: nn.Module, configs: list[PretrainedConfig]) -> None:
        self.decoder = weakref.ref(decoder)
        self.configs = configs
        self.own: list[str] = []
        self.hooks: list[RemovableHandle] = []
        self.users = self.observers = 0

    def acquire(self, observes: bool) -> None:
        with _lock:
            if observes and self.observers == 0:
                self.hooks = install(self.decoder())
            self.observers += observes
            if self.users == 0:
                self.own = [config._attn_implementation.removeprefix(PREFIX) for config in self.configs]
                names = [_register(own) for own in self.own]
                for config, name in zip(self.configs, names, strict=True):
                    config._attn_implementation = name
            self.users += 1

    def release(self, observes: bool) -> None:
        with _lock:
            self.observers -= observes
            if self.observers == 0:
                for hook in self.hooks:
                    hook.remove()
                self.hooks = []
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
            configs = {id(config): config for config in [decoder.config, *layers]}
            _routes[decoder] = Route(decoder, list(configs.values()))
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
