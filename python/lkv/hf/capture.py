"""What the attention modules of a model are called with, for caches whose policies need it.

transformers' caches and attention functions see neither hidden states nor rotary embeddings; a forward pre-hook on the
attention modules does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lkv.hf.compat import attention_modules
from lkv.hf.versions import CACHE_ARGUMENTS, AttentionModule, outside_graphs

HOOKED = frozenset({"hidden_states", "pre_rope_keys"})  # needs for which there are hooks

# Models whose keys are rotated in full-attention layers, halves against each other, the first numbers of a head.
ROTATED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"})


@dataclass(frozen=True, slots=True)
class Captured:
    """What a module was called with: hidden states `[B, n, hidden]`, and cos and sin, `[B or 1, n, R]` each."""

    module: AttentionModule
    hidden_states: Tensor
    rotary: tuple[Tensor, Tensor]


def install_capture(decoder: nn.Module) -> None:
    """Hooks on the attention modules of a decoder, once; they do nothing for caches that do not observe."""
    for module in attention_modules(decoder).values():
        if _capture not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_capture, with_kwargs=True)


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
