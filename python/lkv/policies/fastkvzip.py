"""Fast KVzip (arXiv 2601.17668): what KVzip would say of a token, by a gate that looks like attention with sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lkv.policies.base import Scorer
from lkv.policies.kvzap import CHUNK, of_rows
from lkv.policies.protocol import Observation

NAMES = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b")
EPSILON = 1e-6  # of the norms


@dataclass(frozen=True, eq=False)
class FastGate:
    """Of every layer, G queries and a key for each KV head and token, of a few dimensions, and S keys of no token.

    A token is worth the share that its own key has of a softmax over it and the S keys, the mean of its G queries:
    `mean_g 1 / (1 + sum_s exp(q_g k_s / sqrt(d) - q_g k / sqrt(d) - b_g))`, with RMS norms of queries and keys.

    Attributes:
        layers: the tensors of each layer by their published names: q_proj.weight `[H * G * d, hidden]`, q_proj.bias
            `[H * G * d]`, k_proj.weight `[H * d, hidden]`, q_norm.weight and k_norm.weight `[d]`, k_base
            `[H, 1, S, d]`, b `[H, 1, G]`.
    """

    layers: tuple[Mapping[str, Tensor], ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("lkv.FastKVzip: expected a gate of a layer or more, got none")
        for n, layer in enumerate(self.layers):
            if wrong := _wrong(layer):
                raise ValueError(f"lkv.FastKVzip: expected the published layout of a gate, got {wrong} in layer {n}")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FastGate:
        """Reads a published file, such as q4_dim16_sink16.pt: a dict whose "module" is the tensors of each layer.

        Raises:
            ValueError: for a file of another layout.
        """
        rebuilt: Any = np.empty(0).__reduce__()[0]  # numbers beside the tensors are numpy's
        known: list[Any] = [np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
        known += [(rebuilt, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
        try:
            with torch.serialization.safe_globals(known):
                found = torch.load(path, map_location="cpu", weights_only=True)
            layers = tuple({name: tensor.float() for name, tensor in layer.items()} for layer in found["module"])
        except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                'lkv.FastKVzip: expected a file of torch.save with a dict whose "module" is a list of tensors by name, '
                f"one for each layer, in {path}, got another ({type(error).__name__}: {error})"
            ) from None
        return cls(layers)

    @torch.no_grad()
    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """float32 `[B, H, n]` in (0, 1) of hidden states `[B, n, hidden]`."""
        tensors = {name: tensor.to(hidden.device) for name, tensor in self.layers[layer].items()}
        width = tensors["k_proj.weight"].shape[1]
        if hidden.shape[-1] != width:
            raise ValueError(
                f"lkv.FastKVzip: expected hidden states of a width of {width}, got {hidden.shape[-1]}: is the gate of "
                "another model?"
            )
        return torch.cat([_shares(tensors, piece.float()) for piece in hidden.split(CHUNK, 1)], 1).transpose(1, 2)


def _shares(of: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """`[B, n, H]`."""
    heads, groups, dim = of["b"].shape[0], of["b"].shape[2], of["k_base"].shape[3]
    shape = (*hidden.shape[:2], heads, groups, dim)
    queries = F.linear(hidden, of["q_proj.weight"], of["q_proj.bias"]).view(shape)
    queries = F.rms_norm(queries, (dim,), of["q_norm.weight"], EPSILON) / dim**0.5
    keys = F.linear(hidden, of["k_proj.weight"]).view(*shape[:3], dim)
    keys = F.rms_norm(keys, (dim,), of["k_norm.weight"], EPSILON)
    own = torch.einsum("bnhgd,bnhd->bnhg", queries, keys) + of["b"][:, 0]
    others = torch.einsum("bnhgd,hsd->bnhgs", queries, of["k_base"][:, 0])
    return (1 / (1 + (others - own[..., None]).exp().sum(-1))).mean(-1)


def _wrong(of: Mapping[str, Tensor]) -> str:
    """What is not as `FastGate` has it; nothing if all is."""
    if {*of} != {*NAMES}:
        return f"tensors {', '.join(sorted(of)) or 'of no name'}"
    base, bias = of["k_base"], of["b"]
    if base.dim() != 4 or bias.dim() != 3:
        return f"k_base {list(base.shape)} and b {list(bias.shape)}"
    heads, _, sinks, dim = base.shape
    groups, hidden = bias.shape[2], of["k_proj.weight"].shape[-1]
    shapes: Sequence[tuple[int, ...]] = (
        *((heads * groups * dim, hidden), (heads * groups * dim,), (heads * dim, hidden), (dim,), (dim,)),
        *((heads, 1, sinks, dim), (heads, 1, groups)),
    )
    found = [f"{n} {list(of[n].shape)}" for n, shape in zip(NAMES, shapes, strict=True) if of[n].shape != shape]
    return ", ".join(found)


@dataclass(frozen=True)
class FastKVzip(Scorer):
    """The number that a gate of Fast KVzip gives for a token and a KV head. It looks at no query: rows may go any time.

    The gates are trained on KVzip's scores, so that heads and layers can be compared: the authors' is
    `AcrossLayers(FastKVzip(gate, window))`, kvpress's `layerwise` is `AdaKV(..., alpha=0)`. Arithmetic is float32;
    there it is in the dtype of the gate.

    Attributes:
        gate: `FastGate.load(path)`.
        window: last rows that stay. The authors' are 2 % of the text, rounded down, or 4096 of 32000 tokens and more;
            128, the default, is 2 % of 6400.
        sink: first rows that stay.
    """

    gate: FastGate
    window: int = 128
    sink: int = 4

    needs = frozenset({"hidden_states"})

    @property
    def layers(self) -> int:
        return len(self.gate.layers)

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`."""
        return of_rows("FastKVzip", self.gate(layer, observation.part("hidden_states")), observation)
