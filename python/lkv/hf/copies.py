"""Caches made of others: copies, files and pickles, and the models that they are for."""

from __future__ import annotations

import copy
from os import PathLike
from typing import TYPE_CHECKING, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lkv import policies
from lkv.hf import state
from lkv.hf.calls import Calls
from lkv.hf.capture import ADDED, HOOKED, ROTATED, install_capture, install_cosines
from lkv.hf.compat import Decoder, attention_modules, find_decoder
from lkv.hf.layer import RaggedLayer
from lkv.hf.routing import check_attention, install
from lkv.hf.settings import Settings
from lkv.hf.versions import is_appended_by_copy, output_projection, own_layers
from lkv_ext.shared import keeps_tensors

if TYPE_CHECKING:
    from typing_extensions import Self


C = TypeVar("C", bound="Copies")
Facts = tuple[PretrainedConfig, Settings, str, dict[int, tuple[int, ...]]]  # the arguments of `Calls._make`


class Copies(Calls):
    """What makes a cache of another one; `lkv.Cache` is the public class."""

    @staticmethod
    def _prepare(decoder: Decoder, settings: Settings) -> None:
        """Everything that a forward with a cache of ours needs, checked first."""
        kind = decoder.config.model_type
        if "pre_rope_keys" in settings.observe and kind not in ROTATED:
            raise ValueError(
                f"lkv.Cache: expected one of {', '.join(sorted(ROTATED))} where keys before RoPE are needed, got {kind}"
            )
        for need in sorted(settings.observe & {"attention_cosine", "rotary"}):
            if kind not in ADDED:
                raise ValueError(f"lkv.Cache: expected one of {', '.join(sorted(ADDED))} for {need}, got {kind}")
        if "output_projection" in settings.observe:
            for index, module in attention_modules(decoder.module).items():
                if index in decoder.readers and output_projection(module) is None:
                    raise ValueError(
                        f"lkv.Cache: expected attention with a plain projection o_proj where that is needed, got "
                        f"{type(module).__name__} {index}"
                    )
        check_attention(decoder.module)
        install(decoder)
        if settings.observe & HOOKED:
            install_capture(decoder.module)
        if "attention_cosine" in settings.observe:
            install_cosines(decoder.module)

    def attach(self, model: PreTrainedModel) -> None:
        """Prepares another model of the same kind: a copy, or the one here for a cache that was pickled elsewhere.

        Raises:
            ValueError, TypeError: for a model whose cache would have other layers.
        """
        decoder = find_decoder(model)
        mine, its = ([type(layer) for layer in own_layers(config)] for config in (self._config, decoder.config))
        if decoder.readers != self.readers or mine != its:
            raise ValueError(
                f"lkv.Cache.attach: expected a model with {len(mine)} cache layers like those of "
                f"{self.model}, got {type(model).__name__} with {len(its)}"
            )
        self._prepare(decoder, self.settings)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the cache to one safetensors file, without the model and the weights of a policy."""
        self.settle()
        state.save(self, path)

    @classmethod
    @keeps_tensors
    def load(
        cls,
        path: str | PathLike[str],
        model: PreTrainedModel,
        *,
        policy: str | policies.Policy | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The cache that `save` wrote, ready to go on.

        Args:
            model: a model of the same kind; its weights are not checked.
            policy: for later evictions. Default: the saved one, if it is of `lkv.policies` and has no weights.
            device: default: the model's.

        Raises:
            ValueError: for a file that is truncated, of another kind or not consistent, and a model of another shape.
        """
        decoder = find_decoder(model)
        settings, stored = state.load(path, decoder.config, policy)
        cls._prepare(decoder, settings)
        facts = decoder.config, settings, type(model).__name__, decoder.readers
        return _revived(cls, facts, stored, device or decoder.module.device)

    def __reduce__(self) -> tuple[object, ...]:
        """The form of `save`, for pickle. A process that has made no cache for the model yet has to call `attach`."""
        self.settle()
        facts = self._config, self.settings, self.model, self.readers
        return _revived, (type(self), facts, state.state_of(self))

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """An independent copy on the same model."""
        return self._copy(memo)

    def __copy__(self) -> Self:
        return self.fork()

    def fork(self) -> Self:
        """A copy. Whole rows of a prompt that is not evicted yet are shared, as they are never written to.

        Packed rows are copied. Several policies can be tried on one prompt in this way:

            cache = lkv.Cache(model, retention=1.0, chunks="last", observe={"queries"})
            model(prompt, past_key_values=cache)
            for policy in policies:
                fork = cache.fork()
                fork.evict(policy, retention=0.1)
                model.generate(torch.cat([prompt, question], 1), past_key_values=fork)
        """
        memo: dict[int, object] = {}
        for layer in self.layers:
            if isinstance(layer, RaggedLayer) or is_appended_by_copy(layer):
                memo |= {id(t): t for t in (layer.keys, layer.values) if t is not None}
        return self._copy(memo)

    def _copy(self, memo: dict[int, object]) -> Self:
        self.settle()
        other = object.__new__(type(self))
        memo |= {id(self): other, id(self.settings): self.settings}  # a policy may be large, and holds no request
        for name, value in vars(self).items():
            setattr(other, name, value if name == "_config" else copy.deepcopy(value, memo))
        other.in_prefill = False  # nobody will end it there
        return other


@keeps_tensors
def _revived(cls: type[C], facts: Facts, stored: state.State, device: torch.device | str | None = None) -> C:
    cache = object.__new__(cls)
    cache._make(*facts)
    state.restore(cache, stored, device)
    return cache
