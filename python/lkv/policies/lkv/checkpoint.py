"""What was learned, on disk: a folder with `lkv.safetensors` and `lkv.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lkv.policies.lkv import packaged
from lkv.policies.lkv.fingerprint import fingerprint as fingerprint_of
from lkv.policies.lkv.head_budget import HeadBudget
from lkv.policies.lkv.policy import Learned, learned
from lkv.policies.lkv.token_scorer import TokenScorer

WEIGHTS, CONFIG = "lkv.safetensors", "lkv.json"
# Settings of a design that there were none of at first, with what all checkpoints were before there was a choice.
LATER = {"scale": "standard"}
T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """What has to be the same for a checkpoint to fit a model."""

    model_type: str
    layers: int
    heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        config: PretrainedConfig = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.model_type, config.num_hidden_layers, heads, dim, config.hidden_size, config.vocab_size)


@dataclass(frozen=True)
class Design:
    """Which modules there are, and how many rows at either end every head keeps; see `HeadBudget` and `TokenScorer`.

    Raises:
        ValueError: for numbers that are not whole or too small.
    """

    budget: str = "capped"
    floor: float = 0.005
    input: str = "kv"
    hidden: int = 64
    sink: int = 4
    window: int = 8
    scale: str = "standard"

    def __post_init__(self) -> None:
        for name, least in (("hidden", 1), ("sink", 0), ("window", 0)):
            got = getattr(self, name)
            if type(got) is not int or got < least:
                raise ValueError(f"lkv train: expected {name} >= {least}, a whole number, got {got!r}")
        if type(self.floor) not in (int, float):
            raise ValueError(f"lkv train: expected floor in [0, 1), a number, got {self.floor!r}")

    def build(self, shape: Shape) -> Learned:
        features = 2 * shape.head_dim if self.input == "kv" else shape.hidden_size
        scorer = TokenScorer(shape.layers, shape.heads, features, self.input, self.hidden, self.scale)
        budget = HeadBudget(shape.layers, shape.heads, self.budget, floor=self.floor)
        return learned(scorer, budget, self.sink, self.window)


def save(
    path: str | os.PathLike[str],
    lkv: Learned,
    design: Design,
    shape: Shape,
    facts: Mapping[str, object],
    fingerprint: str | None = None,
) -> None:
    """Writes a checkpoint; one that is there is replaced only by a whole one.

    Args:
        fingerprint: of the weights of the model (`lkv.policies.lkv.fingerprint`); None: `load` will not compare them.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {"model": asdict(shape), "design": asdict(design), "facts": dict(facts)}
    if fingerprint is not None:
        config["fingerprint"] = fingerprint
    text = json.dumps(config, indent=1)
    _replace(folder / WEIGHTS, lambda to: save_file(weights(lkv), to))
    _replace(folder / CONFIG, lambda to: to.write_text(text + "\n"))


def load(path: str | os.PathLike[str], model: PreTrainedModel | None = None, *, any_weights: bool = False) -> Learned:
    """The policy of a checkpoint, for `lkv.Cache(model, lkv.load(path))`: its weights in float32.

    Args:
        path: folder that `lkv train` wrote. Where there is no file or folder of that name: the name of a checkpoint
            that comes with the package (`lkv.policies.lkv.packaged.names()`), as "smollm2".
        model: the model that it shall be used with; its device is taken. Default: the host.
        any_weights: also for another fine-tune of the model that it was trained for. Checkpoints without a fingerprint,
            which older ones are, fit any weights.

    Raises:
        FileNotFoundError: without a checkpoint there.
        ValueError: for a folder that holds something else, and for a model of another shape or with other weights.
    """
    folder = Path(path) if Path(path).exists() else packaged.find(path) or Path(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        known = ", ".join(packaged.names()) or "none"
        hint = "" if folder.exists() else f"; the package has checkpoints of these names: {known}"
        raise FileNotFoundError(f"lkv.load: expected {CONFIG} and {WEIGHTS} in {folder}, found none{hint}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        shape, design = _all_of(Shape, config["model"]), _all_of(Design, {**LATER, **config["design"]})
        with torch.device("cpu"):  # whatever the default device: `put` copies into these weights
            lkv = design.build(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"lkv.load: expected the configuration of a checkpoint in {folder / CONFIG}: {error}"
        ) from None
    if model is not None:
        check(shape, Shape.of(model))
        if config.get("fingerprint") is not None and not any_weights:
            check_weights(config["fingerprint"], model)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"lkv.load: expected the weights of a checkpoint in {folder / WEIGHTS}: {error}") from None
    put(lkv, tensors, folder)
    if model is not None:
        for module in (lkv.token_scorer, lkv.budget):
            module.to(model.device)
    return lkv


def _all_of(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Made of values for all of its fields: a default of today is not what the checkpoint was trained with.

    Raises:
        ValueError: naming those that are missing.
    """
    missing = [field.name for field in fields(cast(Any, kind)) if field.name not in values]
    if missing:
        raise ValueError(f"expected a value of {', '.join(missing)}, found none")
    return kind(**values)


def check(expected: Shape, got: Shape) -> None:
    """
    Raises:
        ValueError: naming all that differs.
    """
    differences = [
        f"{name} {value}, got {getattr(got, name)}"
        for name, value in asdict(expected).items()
        if value != getattr(got, name)
    ]
    if differences:
        raise ValueError(f"lkv.load: expected a model of {'; '.join(differences)}")


def check_weights(expected: str, model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: for a model of another fingerprint.
    """
    got = fingerprint_of(model)
    if got != expected:
        raise ValueError(
            f"lkv.load: expected a model with the weights of the fingerprint {expected}, which the checkpoint was "
            f"trained for, got {got}: another fine-tune, or weights that were rounded to another dtype than bfloat16; "
            "any_weights=True takes it all the same"
        )


def weights(lkv: Learned) -> dict[str, Tensor]:
    parts: tuple[tuple[str, nn.Module], ...] = (("scorer", lkv.token_scorer), ("budget", lkv.budget))
    return {f"{name}.{key}": t.contiguous() for name, module in parts for key, t in module.state_dict().items()}


def put(lkv: Learned, tensors: Mapping[str, Tensor], source: object) -> None:
    """The inverse of `weights`.

    Raises:
        ValueError: where tensors are missing, too many, of another shape, or no finite floating-point numbers.
    """
    expected = {name: tuple(t.shape) for name, t in weights(lkv).items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != got:
        names = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ValueError(f"lkv.load: expected weights of the design in {source}, got others: {', '.join(names)}")
    broken = sorted(name for name, t in tensors.items() if not t.is_floating_point() or not t.isfinite().all())
    if broken:
        raise ValueError(
            f"lkv.load: expected finite floating-point weights in {source}, got others: {', '.join(broken)}"
        )
    parts: tuple[tuple[str, nn.Module], ...] = (("scorer", lkv.token_scorer), ("budget", lkv.budget))
    for name, module in parts:
        module.load_state_dict({key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(name + ".")})


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)
