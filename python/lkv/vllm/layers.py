"""The layers of a model that are evicted: the spec of each one, the rows it keeps, and its scores.

Under tensor parallelism a rank has some heads of every layer; a head's scores are of its own rows alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

from lkv.vllm.refusals import check_layer
from lkv.vllm.scores import scorer
from lkv.vllm.settings import Settings
from lkv.vllm.shares import of_model
from lkv.vllm.spec import EvictedHeadsSpec, EvictedSpec

FULL_SPEC = FullAttentionSpec


class Plan:
    """What one attention layer needs to be evicted. It knows its place in the model once the weights are loaded."""

    def __init__(self, settings: Settings, vllm_config: Any, heads: int) -> None:
        self.settings, self.vllm_config = settings, vllm_config
        self.index = -1
        first = get_tensor_model_parallel_rank() * heads
        self.scorer = scorer(settings.policy, vllm_config.model_config, range(first, first + heads))
        self.sink = self.scorer.sink if settings.sink is None else settings.sink
        self.window = self.scorer.window if settings.window is None else settings.window

    def loaded(self, attention: Any) -> None:
        """Gives the layer of this attention the backend that makes its spec."""
        layers: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            if getattr(layer, "impl", None) is attention:
                self.index = extract_layer_index(name)
                if layer.attn_backend.settings is None:  # else its weights are loaded again
                    layer.attn_backend = of_shares(layer.attn_backend, self.settings, self._shares())

    def scores(self, keys: Tensor, values: Tensor) -> Tensor:
        """float32 `[1, H, T]`, of keys and values `[H, T, D]`."""
        positions = torch.arange(keys.shape[1], device=keys.device)
        found: Tensor = self.scorer.score(self.index, keys.transpose(0, 1), values.transpose(0, 1), positions)
        return found[None]

    def _shares(self) -> tuple[float, ...]:
        """Of this layer: one number, or one per head of this rank."""
        model, ranks = self.vllm_config.model_config, self.vllm_config.parallel_config.tensor_parallel_size
        config, heads = model.hf_text_config, model.get_total_num_kv_heads()
        return of_model(self.settings, config, config.num_hidden_layers, heads, ranks)[self.index]


def plan(attention: Any, vllm_config: Any) -> Plan | None:
    """Of a layer whose attention is being built; None where it is not evicted."""
    settings = Settings.of(vllm_config.additional_config)
    of_decoder = getattr(attention, "attn_type", "decoder") == "decoder"
    if settings is None or not of_decoder or attention.sliding_window not in (None, -1, (-1, -1)):
        return None
    check_layer(attention, settings)
    return Plan(settings, vllm_config, attention.num_kv_heads)


class Layers:
    """Makes the spec of a backend of vLLM that of an evicted layer; before the backend in the order of bases."""

    settings: Settings | None = None
    shares: tuple[float, ...] = (1.0,)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if cls.settings is None or type(spec) is not FULL_SPEC:
            return spec
        if len(cls.shares) == 1:
            return replace_as(spec, EvictedSpec, settings=cls.settings, shares=cls.shares)
        return replace_as(spec, EvictedHeadsSpec, settings=cls.settings, shares=cls.shares, num_head_slots=1)


@cache
def of_shares(backend: type[Layers], settings: Settings, shares: tuple[float, ...]) -> type[Layers]:
    """The backend of the layers whose heads keep these shares."""
    return type(
        backend.__name__, (backend,), {"settings": settings, "shares": shares, "__module__": backend.__module__}
    )
