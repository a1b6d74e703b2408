"""KVzap (arXiv 2601.07891): what KVzip would say of a token, guessed from the hidden state that a layer reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation

CHUNK = 16384  # tokens whose hidden activations are in memory at once
NAME = re.compile(r"layers\.(\d+)(?:\.(0|2))?\.(weight|bias)")


@dataclass(frozen=True, eq=False)
class Gate:
    """Of every layer a linear map, or two and a GELU between them, from a hidden state to a number for each KV head.

    Attributes:
        layers: of each layer the weights `[out, in]` and biases `[out]` of its maps, one after the other.
    """

    layers: tuple[tuple[tuple[Tensor, Tensor], ...], ...]

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Gate:
        """Reads the published model.safetensors: `layers.I.weight` of one map, `layers.I.0.weight` and `.2.` of two.

        Raises:
            ValueError: for a file of another layout.
        """
        try:
            tensors = load_file(path)
            places = [NAME.fullmatch(name) for name in tensors]
            if not tensors or not all(places):
                raise KeyError(next((n for n, at in zip(tensors, places, strict=True) if not at), "tensors"))
            count = 1 + max(int(at[1]) for at in places if at)
            maps = ("0.", "2.") if "layers.0.0.weight" in tensors else ("",)
            made = tuple(
                tuple(tuple(tensors[f"layers.{i}.{m}{part}"].float() for part in ("weight", "bias")) for m in maps)
                for i in range(count)
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"lkv.KVzap: expected a safetensors file of layers.I.weight and .bias, or of layers.I.0 and .2, in "
                f"{path}, got one without {error}"
            ) from None
        return cls(made)  # type: ignore[arg-type]  # pairs

    @torch.no_grad()
    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """float32 `[B, H, n]` of hidden states `[B, n, hidden]`."""
        maps = [(weight.to(hidden.device), bias.to(hidden.device)) for weight, bias in self.layers[layer]]
        if hidden.shape[-1] != maps[0][0].shape[1]:
            raise ValueError(
                f"lkv.KVzap: expected hidden states of a width of {maps[0][0].shape[1]}, got {hidden.shape[-1]}: is "
                "the gate of another model?"
            )
        pieces = []
        for piece in hidden.split(CHUNK, 1):
            out = piece.float()
            for n, (weight, bias) in enumerate(maps):
                out = F.linear(F.gelu(out) if n else out, weight, bias)
            pieces.append(out)
        return torch.cat(pieces, 1).transpose(1, 2)


@dataclass(frozen=True)
class KVzap(Scorer):
    """The number that a gate gives for a token and a KV head. It looks at no query: rows may go at any time.

    The published gates estimate the logarithm of KVzip's scores, so that heads and layers can be compared: the authors
    evict what is below a threshold, of all heads alike, which with a budget is `AcrossLayers(KVzap(gate))`. kvpress's
    KVzapPress alone is `KVzap(gate, window=0)`. Arithmetic is float32; there it is in the dtype of the model. `lkv
    train --input hidden --scale absolute` trains such a gate, an MLP for each head; `lkv.load(path, model)` reads it.

    Attributes:
        gate: `Gate.load(path)`.
        window: last rows that stay: 128 in the authors' code.
        sink: first rows that stay; none there.
    """

    gate: Gate
    window: int = 128
    sink: int = 0

    needs = frozenset({"hidden_states"})

    @property
    def layers(self) -> int:
        return len(self.gate.layers)

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`."""
        return of_rows("KVzap", self.gate(layer, observation.part("hidden_states")), observation)


def of_rows(name: str, of_tokens: Tensor, observation: Observation) -> Tensor:
    """`[B, H, L]`, of each row the number that its token has in `of_tokens` `[B, H, n]`.

    Raises:
        ValueError: for numbers of more or fewer heads than there are, naming the policy.
    """
    if of_tokens.shape[1] != observation.keys.shape[1]:
        raise ValueError(
            f"lkv.{name}: expected a gate for {observation.keys.shape[1]} KV heads, got one for {of_tokens.shape[1]}"
        )
    return of_tokens.gather(2, observation.positions.long().clamp(0, of_tokens.shape[2] - 1))
