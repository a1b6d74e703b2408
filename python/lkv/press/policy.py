"""A policy of ours inside kvpress: rows leave where all heads keep as many, else kvpress's mask hides them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress
from kvpress.presses.base_press import is_prefilling
from torch import Tensor, nn
from transformers import PreTrainedModel

import lkv_ext
from lkv import policies
from lkv.hf import planning
from lkv.hf.capture import ADDED, ROTATED, cosines, install_capture
from lkv.hf.compat import attention_modules, find_decoder
from lkv.hf.versions import output_projection
from lkv.policies import Policy
from lkv.policies.base import treats_heads_alike
from lkv.press.layer import PressedLayer, PressSettings, observed_layer, padding_of


@dataclass
class LKVPress(BasePress):
    """Any policy of scope "layer", "cascade" or "model" as a press, in kvpress's pipelines and wrappers of presses.

    What is kept is what `lkv.Cache` keeps of the same rows. Where a policy treats all heads of a layer alike, rows are
    taken out of the cache. Where it does not, or layers share a total, kvpress's own mask hides them, in all layers:
    the cache stays as large, and `CompactPress(LKVPress(...))` makes it small.

    Attributes:
        policy: a name or a policy object without a second pass.
        compression_ratio: what is evicted, in [0, 1).

    Raises:
        ValueError: for a policy or a ratio out of range, and a model that the policy cannot be used with.
    """

    policy: str | Policy = "snapkv"
    compression_ratio: float = 0.0

    def __post_init__(self) -> None:
        found = policies.get(self.policy)
        if "second_pass" in found.needs:
            raise ValueError(f"lkv.LKVPress: expected a policy that scores while a text is read, got {self.policy}")
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(f"lkv.LKVPress: expected compression_ratio in [0, 1), got {self.compression_ratio}")
        self._found = found
        self._ranks: dict[int, tuple[int, int]] = {}
        self._layers: list[PressedLayer] = []
        self._residuals: dict[int, Tensor] = {}

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        decoder, needs = find_decoder(model), self._found.needs
        known = ADDED if needs & {"attention_cosine", "rotary"} else ROTATED
        kind = decoder.config.model_type
        if needs & {"queries", "all_queries", "pre_rope_keys", "rotary", "attention_cosine"} and kind not in known:
            raise ValueError(f"lkv.LKVPress: expected one of {', '.join(sorted(known))} for this policy, got {kind}")
        modules = attention_modules(decoder.module)
        if "output_projection" in needs and any(output_projection(modules[n]) is None for n in decoder.readers):
            raise ValueError("lkv.LKVPress: expected attention with a plain projection o_proj, got another one")
        if "rotary" in needs:
            install_capture(decoder.module)  # by which the embedding of a module is found
        self._ranks = {n: (rank, len(decoder.readers)) for rank, n in enumerate(sorted(decoder.readers))}
        self._layers.clear()

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            if "attention_cosine" in self._found.needs:
                decoder: Any = find_decoder(model).module
                for block in decoder.layers:
                    hook = block.register_forward_pre_hook(self._keep_residual, with_kwargs=True)
                    stack.callback(hook.remove)
            stack.enter_context(super().__call__(model))
            try:
                yield
            finally:
                self._layers.clear()
                self._residuals.clear()

    def _keep_residual(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._residuals[block.self_attn.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """kvpress's, which calls `compress`; the attention's output is kept where the policy measures it."""
        hidden = kwargs["hidden_states"]
        found = None
        if "attention_cosine" in self._found.needs and is_prefilling(kwargs["cache_position"], hidden.shape[1]):
            if module.layer_idx not in self._residuals:
                raise ValueError(
                    f"lkv.LKVPress: expected to be the press that the model is entered with, as {self._found} measures "
                    "the residual stream, got a hook alone: do not wrap it"
                )
            padding = padding_of(kwargs.get("attention_mask"), *hidden.shape[:2])
            found = cosines(self._residuals.pop(module.layer_idx), output[0], padding)
        return super().forward_hook(module, input, kwargs | {"lkv_cosines": found}, output)

    @torch.no_grad()
    def compress(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: object, kwargs: dict
    ) -> tuple[Tensor, Tensor]:
        """The keys and values `[B, H, n, D]` that stay; all of them, where they are hidden by the mask."""
        if self.compression_ratio == 0:
            return keys, values
        attention: Any = module
        rank = self._ranks.get(attention.layer_idx)
        if rank is None:
            raise ValueError(
                f"lkv.LKVPress: expected a model whose layer {attention.layer_idx} it knows, got another one: enter "
                "the press with the model, or call post_init_from_model"
            )
        settings = PressSettings.of(self._found, self.compression_ratio)
        found = kwargs.get("lkv_cosines")
        layer = observed_layer(attention, rank, settings, hidden_states, keys, values, kwargs, found)
        if self._found.scope == "layer":
            return self._kept(layer, *planning.plan([layer], settings))
        if rank[0] == 0:
            self._layers.clear()
        self._layers.append(layer)
        if len(self._layers) == rank[1]:
            layers, self._layers = self._layers, []
            for each, plan in zip(layers, planning.plan(layers, settings), strict=True):
                self._hide(each, plan)
        return keys, values

    def _kept(self, layer: PressedLayer, plan: planning.EvictionPlan) -> tuple[Tensor, Tensor]:
        # By the policy, not by the budgets that it made: these may agree in one layer and differ in the next.
        if plan.budgets is None or layer.padded or not treats_heads_alike(self._found):
            self._hide(layer, plan)
            return layer.keys, layer.values
        places = _positions(layer, plan)[..., None]
        keys, values = (x.gather(2, places.expand(-1, -1, -1, x.shape[3])) for x in (layer.keys, layer.values))
        return keys, values

    @staticmethod
    def _hide(layer: PressedLayer, plan: planning.EvictionPlan) -> None:
        """By kvpress's mask, which works while tokens are generated."""
        module: Any = layer.module
        module.masked_key_indices = None
        if plan.scores is None:
            return
        if module.config._attn_implementation == "eager":
            raise ValueError(
                "lkv.LKVPress: expected another attention than 'eager', which kvpress's mask does not reach"
            )
        batch, heads, length = layer.keys.shape[:3]
        hidden = torch.ones(batch, heads, length + 1, dtype=torch.bool, device=layer.keys.device)
        places = _positions(layer, plan)
        hidden.scatter_(2, places.masked_fill(places < 0, length), False)
        there = torch.arange(length, device=hidden.device) >= length - torch.tensor(
            layer.token_counts, device=hidden.device
        ).view(-1, 1, 1)
        module.masked_key_indices = (hidden[..., :length] & there).nonzero(as_tuple=True)


def _positions(layer: PressedLayer, plan: planning.EvictionPlan) -> Tensor:
    """int64 `[B, H, C]`, of the rows that stay, ascending; -1 behind those of a head that keeps fewer."""
    assert plan.scores is not None and plan.budgets is not None
    batch, heads, length = layer.keys.shape[:3]
    lengths = torch.tensor(layer.token_counts, device="cpu")[:, None].expand(batch, heads)
    options: dict[str, Any] = dict(lengths=lengths, starts=length - lengths, sink=plan.sink, window=plan.window)
    capacity = None if plan.budgets.is_cpu else length
    found = lkv_ext.select(plan.scores, plan.budgets, layout="padded", capacity=capacity, **options)
    return found.positions.view(batch, heads, -1).long()
