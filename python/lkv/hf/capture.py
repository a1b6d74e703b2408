"""What the attention modules of a model are called with, for caches whose policies need it.

transformers' caches and attention functions see neither hidden states nor rotary embeddings; a forward pre-hook on the
attention modules does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lkv.hf.compat import attention_modules
from lkv.hf.masks import PaddingInfo
from lkv.hf.versions import CACHE_ARGUMENTS, AttentionModule, outside_graphs
from lkv_ext.shared import keeps_tensors

HOOKED = frozenset({"hidden_states", "pre_rope_keys", "rotary"})  # needs for which there are hooks
_embeddings: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()  # rotary ones, by attention module

# Models whose keys are rotated in full-attention layers, halves against each other, the first numbers of a head.
ROTATED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"})


# Models in which what attention gives is added to what came into the layer as it is.
ADDED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3"})


@dataclass(frozen=True, slots=True)
class Captured:
    """What a module was called with: hidden states `[B, n, hidden]`, and cos and sin, `[B or 1, n, R]` each."""

    module: AttentionModule
    hidden_states: Tensor
    rotary: tuple[Tensor, Tensor]


def install_capture(decoder: nn.Module) -> None:
    """Hooks on the attention modules of a decoder, once; they do nothing for caches that do not observe."""
    embedding = next((m for name, m in decoder.named_modules() if name.split(".")[-1] == "rotary_emb"), None)
    for module in attention_modules(decoder).values():
        if embedding is not None:
            _embeddings[module] = ref(embedding)
        if _capture not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_capture, with_kwargs=True)


def rotary_embedding(module: object) -> Any:
    """The rotary embedding of the decoder of an attention module, by whose hooks it is known. Raises ValueError."""
    known = _embeddings.get(module) if isinstance(module, nn.Module) else None
    embedding = None if known is None else known()
    if embedding is None:
        raise ValueError(f"lkv.Cache: expected {type(module).__name__} of a decoder with rotary_emb, got one without")
    return embedding


def _capture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name in CACHE_ARGUMENTS:
        if getattr(kwargs.get(name), "is_lkv_cache", False):
            hidden: Any = kwargs.get("hidden_states", args[0] if args else None)
            _note(module, kwargs[name].layers, hidden, kwargs.get("position_embeddings"))


@outside_graphs
def _note(module: AttentionModule, layers: Sequence[object], hidden: Tensor, rotary: Any) -> None:
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    observations = getattr(layer, "observations", None)
    if observations is not None and observations.hooked:  # one of our layers that needs it
        observations.captured = Captured(module, hidden, rotary)


def install_cosines(decoder: nn.Module) -> None:
    """Hooks that measure what attention does to the residual stream, once; see `install_capture`."""
    attending = {id(module) for module in attention_modules(decoder).values()}
    for block in decoder.modules():
        for module in block.children():
            if id(module) in attending and _note_cosine not in module._forward_hooks.values():
                block.register_forward_pre_hook(_note_residual, with_kwargs=True)
                module.register_forward_hook(_note_cosine, with_kwargs=True)


def _ours(kwargs: dict[str, Any]) -> Any:
    """The cache of ours that a module is called with; other calls stay in a compiled graph."""
    caches: list[Any] = [kwargs.get(name) for name in CACHE_ARGUMENTS]
    return next((cache for cache in caches if getattr(cache, "is_lkv_cache", False)), None)


def _observing(layers: Sequence[Any], index: int | None) -> Any:
    """The layer of this index, if it is one of ours and its cosine is observed."""
    layer = layers[index] if index is not None and index < len(layers) else None
    return layer if "attention_cosine" in getattr(getattr(layer, "settings", None), "observe", ()) else None


def _note_residual(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _ours(kwargs)
    if cache is not None:
        hidden: Any = kwargs.get("hidden_states", args[0] if args else None)
        _take_residual(block, cache.layers, hidden)


@outside_graphs
def _take_residual(block: nn.Module, layers: Sequence[object], hidden: Tensor) -> None:
    indices = (getattr(module, "layer_idx", None) for module in block.children())
    layer = _observing(layers, next((i for i in indices if i is not None), None))
    if layer is not None:
        layer.observations.residual = hidden


def _note_cosine(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _ours(kwargs)
    if cache is not None:
        _take_cosine(module, cache.layers, output[0] if isinstance(output, tuple) else output)


@outside_graphs
def _take_cosine(module: AttentionModule, layers: Sequence[object], added: Tensor) -> None:
    layer = _observing(layers, module.layer_idx)
    if layer is None or layer.observations.residual is None:
        return
    observations = layer.observations
    observations.cosines.push(cosines(observations.residual, added, observations.padding))
    observations.residual = observations.padding = None


@keeps_tensors
def cosines(before: Tensor, added: Tensor, padding: PaddingInfo | None) -> Tensor:
    """float32 `[B, n, 1]`: cos(x, x + y) of `[B, n, hidden]`, in the order of the rows; NaN for padding."""
    cosine = cosine_similarity(before.float(), (before + added).float(), dim=-1)
    if padding is not None:
        if padding.order is not None:
            cosine = cosine.gather(1, padding.order.to(cosine.device))
        counts = torch.tensor(padding.counts, device=cosine.device)[:, None]
        cosine = cosine.masked_fill(torch.arange(cosine.shape[1], 0, -1, device=cosine.device) > counts, torch.nan)
    return cosine[..., None]
