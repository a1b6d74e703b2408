"""Scores of the rows of a prompt by what an engine's cache holds of them: keys after RoPE, and values.

LKV-T reads keys before RoPE: they are turned back by the rotary embedding of the model's config, as transformers
computes it, in chunks, to the rounding of the cache.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lkv import policies
from lkv.hf.capture import ROTATED
from lkv.policies import Observation, Policy
from lkv.policies.base import scores_once
from lkv.policies.lkv import Learned, TokenScorer
from lkv.policies.lkv.checkpoint import load

CHUNK = 4096  # tokens whose keys are there before RoPE at once
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the same for every length of a prompt


class Scorer(Protocol):
    """
    Attributes:
        sink, window: first and last rows that every head keeps by the method.
    """

    sink: int
    window: int

    def score(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Scores of all rows of a prompt in one layer; higher is kept.

        Args:
            layer: its index in the model. keys, values: `[T, H, D]`, `[T, H, Dv]`, keys after RoPE.
            positions: int `[T]`, those that the keys were rotated by.

        Returns:
            float32 `[H, T]`.
        """
        ...


class ByPolicy:
    """A policy that looks at keys, values and their order alone."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.sink, self.window = policy, policy.sink, policy.window

    @torch.no_grad()
    def score(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        count, heads = keys.shape[:2]
        lengths = torch.full((1, heads), count, device=keys.device)
        observation = Observation(
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            positions.expand(1, heads, -1),
            lengths,
            torch.zeros_like(lengths),
        )
        return self.policy.score(layer, observation)[0].float()


class ByLKV:
    """LKV-T, of some of a layer's heads where they are shared out among GPUs."""

    def __init__(self, learned: Learned, rotation: nn.Module, heads: range) -> None:
        self.mlp = of_heads(learned.token_scorer, heads)
        self.rotation, self.sink, self.window = rotation, learned.sink, learned.window

    @torch.no_grad()
    def score(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        for module in (self.mlp, self.rotation):
            module.to(keys.device)
        parts = []
        for k, v, at in zip(keys.split(CHUNK), values.split(CHUNK), positions.split(CHUNK), strict=True):
            features = keys.new_empty(1, k.shape[1], len(k), k.shape[2] + v.shape[2], dtype=torch.float32)
            undo(self.rotation, k.transpose(0, 1)[None], at[None], out=features[..., : k.shape[2]])
            features[0, ..., k.shape[2] :] = v.transpose(0, 1)
            parts.append(self.mlp.raw(layer, features))
        raw = torch.cat(parts, 2)
        return self.mlp.scaled(raw, torch.ones_like(raw, dtype=torch.bool))[0]


def scorer(policy: str, model_config: Any, heads: range | None = None) -> Scorer:
    """
    Args:
        policy: the name of a policy that needs nothing but keys and values, or a checkpoint as `lkv.load` takes it. Its
            weights are not compared with the model's: an engine has them in another form.
        model_config: of vLLM (`hf_text_config` is read), or a config of transformers.
        heads: which KV heads of every layer `score` gets; default: all.

    Raises:
        ValueError: for a policy that needs more than keys and values, a checkpoint of another model, and a model whose
            rotations are not known.
        FileNotFoundError: for a policy that is neither a name nor a checkpoint.
    """
    if policy in policies.names():
        found = policies.get(policy)
        if found.needs or found.scope != "layer" or not scores_once(found):
            raise ValueError(
                f"lkv.vllm: expected a policy that scores by keys and values alone, as knorm, keydiff, streaming_llm "
                f"or a checkpoint of LKV, got {policy!r}, which needs {', '.join(sorted(found.needs)) or 'all layers'}"
            )
        return ByPolicy(found)
    config: PretrainedConfig = getattr(model_config, "hf_text_config", model_config)
    model = cast(PreTrainedModel, SimpleNamespace(config=config, device="cpu"))  # all that `load` reads of one
    with float32(), torch.device("cpu"):  # an engine builds its model on a default device, too
        learned = load(policy, model, any_weights=True)
        if learned.needs != {"pre_rope_keys"}:
            raise ValueError(
                f"lkv.vllm: expected a checkpoint that scores keys and values, got {policy}, which reads hidden "
                "states: train one with --input kv"
            )
        return ByLKV(learned, rotation_of(config), range(learned.token_scorer.heads) if heads is None else heads)


@contextlib.contextmanager
def float32() -> Iterator[None]:
    """Modules are made in float32: while an engine builds its model, the default is the model's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def of_heads(scorer: TokenScorer, heads: range) -> TokenScorer:
    """The same MLPs, of some heads of every layer."""
    part = TokenScorer(scorer.layers, len(heads), scorer.features, scorer.input, scorer.up.shape[-1], scorer.scale)
    part.load_state_dict({name: t[:, heads.start : heads.stop] for name, t in scorer.state_dict().items()})
    return part.eval()


def undo(rotation: nn.Module, keys: Tensor, positions: Tensor, out: Tensor) -> None:
    """Writes keys of tokens at `positions` `[1, n]` as they were before RoPE.

    What `lkv.hf.token_log.Rotary.undo` computes, of all heads at once.

    Args:
        keys: `[1, H, n, D]`. out: float32 `[1, H, n, D]`.
    """
    cos, sin = (t[:, None].float() for t in rotation(keys, positions))  # [1, 1, n, R]
    size = cos * cos + sin * sin
    half = cos.shape[-1] // 2
    (c, d), (s, t) = (part.div_(size).split(half, -1) for part in (cos, sin))
    first, second, rest = out[..., :half], out[..., half : 2 * half], slice(2 * half, None)
    x, y = keys[..., :half].float(), keys[..., half : 2 * half].float()
    torch.addcmul(x * c, y, s, out=first)
    torch.addcmul(y * d, x, t, value=-1, out=second)
    out[..., rest] = keys[..., rest]


def rotation_of(config: PretrainedConfig) -> nn.Module:
    """The rotary embedding of a model, from its config.

    Raises:
        ValueError: for a model whose keys are not known to be turned by halves and by nothing else, and for rotations
            that depend on the length of a text or on the layer.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if config.model_type not in ROTATED or kind not in STATIC_ROPE:
        raise _unknown(config, repr(kind))
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config).get_decoder()
    rotation: nn.Module = type(decoder.rotary_emb)(config=config)
    if list(inspect.signature(rotation.forward).parameters) != ["x", "position_ids"]:
        raise _unknown(config, "one for each kind of layer")
    return rotation


def _unknown(config: PretrainedConfig, got: str) -> ValueError:
    return ValueError(
        f"lkv.vllm: expected a model of {', '.join(sorted(ROTATED))} with one rotary embedding of "
        f"{', '.join(STATIC_ROPE)} for a checkpoint of LKV, got {config.model_type} with {got}: take a policy that "
        "reads keys after RoPE, as keydiff"
    )
