"""Sends a model's attention through `lkv.hf.attention` for the length of a forward with a cache of ours.

transformers looks attention and mask functions up by the name in a config. For every attention that a model may have
of its own there is one name of ours, `lkv_sdpa` for `sdpa`. Hooks on the decoder, which know nothing but the arguments
of its forward, put the name in when a forward begins with a cache of ours, and take it out when the last such forward
of any thread ends. Outside of it a config, its copies and other models of it have their own attention. During it, our
function calls the model's own attention for all keys that are not of a cache of ours.
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lkv.hf.attention import make_attention
from lkv.hf.compat import Decoder
from lkv.hf.masks import Mask
from lkv.hf.versions import CACHE_ARGUMENTS, outside_graphs

PREFIX = "lkv_"
_lock = threading.Lock()
_configs: WeakKeyDictionary[nn.Module, list[PretrainedConfig]] = WeakKeyDictionary()
_routed: dict[int, _Routed] = {}  # by id of a config, while forwards run
_abandoned: deque[list[_Routed]] = deque()


class CallOwner(Protocol):
    """The cache of ours that a forward was given."""

    outer_mask: Tensor | None

    def repeated(self, count: int, positions: Tensor | None) -> int: ...
    def begin_call(self, route: Route, batch: int, count: int, mask: Mask) -> None: ...
    def end_call(self, done: bool) -> None: ...


@dataclass
class _Routed:
    config: PretrainedConfig
    own: str
    forwards: int = 0


class Route:
    """Our attention in the configs of a decoder, from now until `close`."""

    def __init__(self, decoder: nn.Module) -> None:
        self._open: list[_Routed] = []
        with _locked():
            for config in _configs_of(decoder):
                now = config._attn_implementation
                own = now.removeprefix(PREFIX)
                name = _register(own)
                entry = _routed.setdefault(id(config), _Routed(config, own))
                if now != name:
                    entry.own = own
                    config._attn_implementation = {"": name}  # and not in the configs within, of eyes and ears
                entry.forwards += 1
                self._open.append(entry)

    def close(self) -> None:
        with _locked():
            _restore(self._open)

    def __del__(self) -> None:
        """For a forward that was interrupted. The collector may call this while its own thread has the lock."""
        _abandoned.append(self._open)
        _restore_abandoned()


@contextmanager
def _locked() -> Iterator[None]:
    try:
        with _lock:
            yield
    finally:
        _restore_abandoned()


def _restore_abandoned() -> None:
    """Does not wait for the lock: its holder calls this after its release."""
    while _abandoned and _lock.acquire(blocking=False):
        try:
            _restore(_abandoned.popleft())
        finally:
            _lock.release()


def _restore(entries: list[_Routed]) -> None:
    while entries:
        entry = entries.pop()
        entry.forwards -= 1
        if entry.forwards == 0:
            del _routed[id(entry.config)]
            if entry.config._attn_implementation == PREFIX + entry.own:
                entry.config._attn_implementation = {"": entry.own}


def check_attention(decoder: nn.Module) -> None:
    """Raises ValueError for an attention that cannot be replaced."""
    for config in _configs_of(decoder):
        _register(config._attn_implementation.removeprefix(PREFIX))


def install(decoder: Decoder) -> None:
    """Hooks on a decoder and the models around it, once; they do nothing for other caches."""
    with _locked():
        for module, before, after in (
            (decoder.module, _begin, _end),
            *((outer, _begin_outer, _end_outer) for outer in decoder.outer),
        ):
            if before not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(before, with_kwargs=True)
                module.register_forward_hook(after, with_kwargs=True, always_call=True)


def _begin(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = _cache_of(module, args, kwargs)
    if cache is None:
        return None
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    ids, embeds, mask, positions = (_argument(module, args, kwargs, name) for name in names)
    tokens = embeds if ids is None else ids
    if tokens is None:
        return None  # the model raises
    skip = _begin_call(cache, module, tokens, mask, positions)
    if skip == 0:
        return None
    new = {name: kwargs[name][:, skip:] for name in (*names[:2], "position_ids") if kwargs.get(name) is not None}
    return args, kwargs | new


def _end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
    cache = _cache_of(module, args, kwargs)
    if cache is not None:
        _end_call(cache, output is not None)  # a forward that raised has none


def _begin_outer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cache_of(module, args, kwargs)
    if cache is not None:
        mask = _argument(module, args, kwargs, "attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            cache.outer_mask = mask


def _end_outer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
    cache = _cache_of(module, args, kwargs)
    if cache is not None:
        cache.outer_mask = None


@outside_graphs
def _begin_call(cache: CallOwner, decoder: nn.Module, tokens: Tensor, mask: Mask, positions: Tensor | None) -> int:
    """How many of the first tokens are left out, as the cache has them."""
    batch, count = tokens.shape[:2]
    skip = cache.repeated(count, positions)
    route = Route(decoder)
    try:
        cache.begin_call(route, batch, count - skip, mask)
    except BaseException:
        route.close()
        raise
    return skip


@outside_graphs
def _end_call(cache: CallOwner, done: bool) -> None:
    cache.end_call(done)


def _cache_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallOwner | None:
    """The cache of ours that a forward was given, if any."""
    for name in CACHE_ARGUMENTS:
        cache = _argument(module, args, kwargs, name)
        if getattr(cache, "is_lkv_cache", False):
            return cache
    return None


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    if name in kwargs or not args:
        return kwargs.get(name)
    if len(args) == 1:  # what models are called with: the tokens, and all else by name
        return args[0] if name == "input_ids" else None
    place = _places(type(module).forward).get(name, len(args))
    return args[place] if place < len(args) else None


@lru_cache(maxsize=64)
def _places(forward: Callable[..., Any]) -> dict[str, int]:
    """Positions of the arguments of a forward, by name."""
    names: Sequence[str] = list(inspect.signature(forward).parameters)
    return {name: place - 1 for place, name in enumerate(names)}


def _configs_of(decoder: nn.Module) -> list[PretrainedConfig]:
    """Where the attention modules of a decoder read the name."""
    if decoder not in _configs:
        readers = (m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "config"))
        configs: list[Any] = [decoder.config, *(m.config for m in readers)]
        _configs[decoder] = list({id(config): config for config in configs}.values())
    return _configs[decoder]


@cache
def _register(own: str) -> str:
    name = PREFIX + own
    has_attention = own == "eager" or own in ALL_ATTENTION_FUNCTIONS
    if own not in ALL_MASK_ATTENTION_FUNCTIONS or not has_attention or own.startswith(("flex", "paged")):
        raise ValueError(f"lkv.Cache: expected a model with eager, sdpa or flash attention, got {own!r}")
    AttentionInterface.register(name, make_attention(own))
    # The sizes that the cache reports make it the mask of the tokens that the model's own attention sees, or, when the
    # rows are ours, of the new tokens among themselves.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    return name
