"""What `lkv.Cache` requires of a model, found by looking at its attention modules, before any token comes."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lkv.hf.versions import HFLayer, RecurrentLayer, is_full_attention, own_layers


@dataclass(frozen=True)
class Decoder:
    """The part of a model that a cache belongs to.

    Attributes:
        module: the stack of layers. outer: models around it whose forward calls it, the whole one first.
        readers: for every full-attention layer the layers that attend to its rows, by index: itself, and those that
            share its keys and hold none of their own.
    """

    module: PreTrainedModel
    outer: tuple[PreTrainedModel, ...]
    readers: dict[int, tuple[int, ...]]

    @property
    def config(self) -> PretrainedConfig:
        return self.module.config


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a model; wrappers of PEFT, torch.compile and data parallelism are looked through.

    Raises:
        TypeError: for something that is no transformers model.
        ValueError: for a model whose attention cannot read rows of its own number per head, with the reason.
    """
    whole = unwrapped(model)
    if not isinstance(whole, PreTrainedModel):
        raise TypeError(f"lkv.Cache: expected a transformers model, got {type(whole).__name__}")
    name = type(whole).__name__
    if whole.config.is_encoder_decoder:
        raise _refusal(name, "is an encoder-decoder, whose cache has a part for each half")
    module = unwrapped(whole.get_decoder())
    if not isinstance(module, PreTrainedModel):
        raise _refusal(name, "has no decoder that get_decoder() would give")
    if getattr(module.config, "kv_lora_rank", None) is not None:
        raise _refusal(name, "caches latents (MLA), from which keys and values are made anew in every call")
    if RecurrentLayer is None and (whole._is_stateful or module._is_stateful):
        raise _refusal(name, "has recurrent layers, for which this version of transformers has no cache layers")
    outer = tuple(m for m in whole.modules() if isinstance(m, PreTrainedModel) and m is not module and _has(m, module))
    return Decoder(module, outer, _readers(name, module))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in a wrapper: `PeftModel`, `OptimizedModule` of torch.compile, `DistributedDataParallel`."""
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        base = getattr(model, "get_base_model", None)
        if inner is None and base is not None:
            inner = base()
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """By layer: the innermost modules that know the index of their layer and attend."""
    indexed = [(i, m) for m in decoder.modules() if isinstance(i := getattr(m, "layer_idx", None), int)]
    outer = {id(m) for _, m in indexed for inner in m.modules() if inner is not m and hasattr(inner, "layer_idx")}
    return {i: m for i, m in indexed if id(m) not in outer}


def _readers(name: str, decoder: PreTrainedModel) -> dict[int, tuple[int, ...]]:
    """See `Decoder`. Raises ValueError where a layer cannot be followed."""
    layers, modules = own_layers(decoder.config), attention_modules(decoder)
    owners = [i for i, layer in enumerate(layers) if is_full_attention(layer)]
    if not owners:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise _refusal(name, f"has no layers of full attention alone: its cache has {', '.join(kinds)}")
    readers = {i: [i] for i in owners}
    for i, module in modules.items():
        if getattr(module, "is_kv_shared_layer", False):
            owner = _owner(module, modules, layers)
            if owner in readers:
                readers[owner].append(i)
                owners.append(i)
    for i in owners:
        if i not in modules:
            raise _refusal(name, f"has no attention module with layer_idx = {i}")
        reason = _unlike_ours(modules[i], decoder.config)
        if reason is not None:
            raise _refusal(name, f"has {type(modules[i]).__name__}, which {reason}")
    return {i: tuple(all_of) for i, all_of in readers.items()}


def _owner(module: nn.Module, modules: dict[int, nn.Module], layers: list[HFLayer]) -> int | None:
    """The layer whose keys a module attends to: the last of its kind that has some."""
    known = getattr(module, "kv_shared_layer_index", None)
    if known is not None:
        return known
    same = [
        i
        for i, m in modules.items()
        if i < len(layers) and not m.is_kv_shared_layer and m.layer_type == module.layer_type
    ]
    return max(same, default=None)


def _unlike_ours(module: nn.Module, config: PretrainedConfig) -> str | None:
    """Why rows cannot be attended to in the place of what a module does; None: they can."""
    forward = inspect.unwrap(type(module).forward)
    names = forward.__code__.co_names
    if "ALL_ATTENTION_FUNCTIONS" not in names:
        if _has_alibi(config):
            return "adds biases of the distance (ALiBi) in attention of its own"
        return "attends by itself, not through transformers' AttentionInterface"
    if "layers" in names and getattr(module, "is_cross_attention", True):
        return "reads the tensors of the cache by itself"
    if False in (getattr(module, "is_causal", True), getattr(config, "is_causal", True)):
        return "attends in both directions"
    if _calls(forward, "attention_interface") > 1:
        return "attends more than once for every update of the cache"
    if "shared_kv_states" in forward.__code__.co_varnames and not hasattr(module, "is_kv_shared_layer"):
        return "shares keys between layers in a way that is not known"
    return None


def _has_alibi(config: PretrainedConfig) -> bool:
    inner = getattr(config, "attn_config", config)
    return bool(getattr(inner, "alibi", config.model_type == "bloom"))


def _calls(function: Callable[..., object], name: str) -> int:
    """How often a local name is read."""
    return sum(op.opname.startswith("LOAD_FAST") and name in str(op.argval) for op in dis.get_instructions(function))


def _has(model: nn.Module, module: nn.Module) -> bool:
    return any(m is module for m in model.modules())


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(
        f"lkv.Cache: expected a model whose full-attention layers can be evicted, got {name}, which {reason}"
    )
