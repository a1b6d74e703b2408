"""What the attention modules of a model are called with, for caches whose policies need it.

transformers' caches and attention functions see neither hidden states nor rotary embeddings; a forward pre-hook on the
attention modules does. The hooks lie on the model while a cache that observes either is alive, see `lkv.hf.routing`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HOOKED = frozenset({"hidden_states", "pre_rope_keys"})  # needs for which there are hooks

# Models whose keys are rotated in full-attention layers, halves against each other, the first numbers of a head.
ROTATED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"})


@dataclass(frozen=True, slots=True)
class Captured:
    """What a module was called with: hidden states `[B, n, hidden]`, and cos and sin, `[B or 1, n, R]` each."""

    module: nn.Module
    hidden_states: Tensor | None
    rotary: tuple[Tensor, Tensor] | None


def install(decoder: nn.Module) -> list[RemovableHandle]:
    """Hooks on the innermost modules that know the index of their layer: those that attend."""
    indexed = [m for m in decoder.modules() if hasattr(m, "layer_idx")]
    outer = {id(m) for m in indexed for inner in m.modules() if inner is not m and hasattr(inner, "layer_idx")}
    return [m.register_forward_pre_hook(_capture, with_kwargs=True) for m in indexed if id(m) not in outer]


@torch.compiler.disable
def _capture(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
    layers = getattr(cache, "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    witness = getattr(layer, "witness", None)
    if witness is not None and witness.hooked:  # one of our layers that asks for it
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        witness.captured = Captured(module, hidden, kwargs.get("position_embeddings"))
