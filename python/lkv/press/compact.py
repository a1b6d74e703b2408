"""What a press of kvpress masks really leaves the cache: it becomes a `lkv.Cache` of the other rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress, DecodingPress, DMSPress, PrefillDecodingPress
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lkv.hf import Cache
from lkv.hf.compat import attention_modules, find_decoder
from lkv.hf.planning import EvictionPlan
from lkv.policies import StreamingLLM


@dataclass
class CompactPress(BasePress):
    """Any press; rows that it masks while a prompt is read are evicted when its context ends.

    A press that prunes evicts by itself, and nothing is added to it. One that masks, as all do whose heads keep
    different numbers, leaves the cache as large as it was and makes a key for every hidden row at every step. Here the
    `DynamicCache` that the prompt was read with becomes, as the object that it is, a `lkv.Cache` of the rows that are
    left, for the model's forward, `generate` and `lkv.press.CompactPipeline`. The rows are those of the press.

    It is the outermost press, and is entered for every prompt anew.

    Attributes:
        press: one that works while a prompt is read.
        reserve: rows of slack after the rows of every head.

    Raises:
        ValueError: for a press that masks while tokens are generated; on leaving the context for a cache that is no
            plain `DynamicCache` of one length, or if several prompts were read in it.
    """

    press: BasePress
    reserve: int = 64

    def __post_init__(self) -> None:
        press = self.press
        if isinstance(press, DecodingPress | PrefillDecodingPress) or (isinstance(press, DMSPress) and press.decoding):
            raise ValueError(
                f"lkv.CompactPress: expected a press that works while a prompt is read, got {type(press).__name__}, "
                "which goes on while tokens are generated"
            )
        if self.reserve < 1:
            raise ValueError(f"lkv.CompactPress: expected reserve >= 1, got {self.reserve}")
        self._caches: list[Any] = []

    @property
    def compression_ratio(self) -> Any:
        """The press's own."""
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        self.press.post_init_from_model(model)

    def compress(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.press.compress(*args, **kwargs)

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The press's own, where another press calls it: what it masks stays masked then."""
        return self.press.forward_hook(module, input, kwargs, output)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        decoder = find_decoder(model)
        modules: dict[int, Any] = {
            n: module for n, module in attention_modules(decoder.module).items() if n in decoder.readers
        }
        for module in modules.values():
            module.masked_key_indices = None  # kvpress's, of an earlier prompt
        self._caches.clear()
        hook = modules[min(modules)].register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            with self.press(model):
                try:
                    yield
                finally:
                    hook.remove()  # a press may run the model again, behind the prompt
            self._compact(model, modules)
        finally:
            hook.remove()
            self._caches.clear()

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length(module.layer_idx) == 0:
            self._caches.append(cache)

    def _compact(self, model: PreTrainedModel, modules: dict[int, Any]) -> None:
        marks = {n: module.masked_key_indices for n, module in modules.items()}
        if all(mark is None for mark in marks.values()):
            return
        if len(self._caches) != 1:
            raise ValueError(
                f"lkv.CompactPress: expected one prompt in the context of a press that masks, got {len(self._caches)}: "
                "enter it anew for each, and pass past_key_values=DynamicCache()"
            )
        (cache,) = self._caches
        made = compacted(model, cache, marks, self.reserve)
        for module in modules.values():
            module.masked_key_indices = None
        # Whoever holds the cache goes on with this very object, as kvpress's pipeline does.
        vars(cache).clear()
        cache.__class__ = Cache
        vars(cache).update(vars(made))


@torch.no_grad()
def compacted(model: PreTrainedModel, cache: object, marks: dict[int, Any], reserve: int = 64) -> Cache:
    """A cache of the rows that are not marked.

    Args:
        cache: that has read a prompt, whole in all layers.
        marks: for every layer the sequences, heads and positions of the rows that leave, or None.
    """
    layers: list[Any] = list(getattr(cache, "layers", ()))
    full = [type(layer) is DynamicLayer for layer in layers]
    lengths = {tuple(layer.keys.shape[:3:2]) for layer, whole in zip(layers, full, strict=True) if whole}
    if type(cache) is not DynamicCache or len(lengths) != 1 or not all(full):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise ValueError(
            "lkv.CompactPress: expected a DynamicCache of full layers of one length, for a press that masks, got "
            f"{type(cache).__name__} of {kinds or 'none'} of {len(lengths)} sizes"
        )
    made = Cache(model, StreamingLLM(), retention=1.0, chunks="last", reserve=reserve)
    made.explicit = True  # the prompt has been read: no call that follows is one
    for layer, read in zip(made.ragged, layers, strict=True):
        batch, heads, length = read.keys.shape[:3]
        stays = torch.ones(batch, heads, length, dtype=torch.bool, device=read.keys.device)
        mark = marks.get(layer.index)
        if mark is not None:
            stays[tuple(part.to(stays.device) for part in mark)] = False
        layer.keys, layer.values, layer.is_initialized = read.keys, read.values, True
        layer.token_counts, layer.row_counts = [length] * batch, [length * heads] * batch
        budgets = stays.sum(2).cpu()
        layer.apply(EvictionPlan(stays.float(), budgets, budgets.sum(1).tolist()))
    return made
