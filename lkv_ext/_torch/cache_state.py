"""The state of a RaggedCache, as pickle and safetensors keep it: a dict of PARTS, COUNTS and "companions"."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from os import PathLike
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lkv_ext._common.options import MOST
from lkv_ext._torch import spans

PARTS = ("k", "v", "positions", "lengths", "cu_seqlens")
COUNTS = ("seen", "max_length", "_free", "_tail", "_reserve", "align")
INTEGERS = dict(positions="[T]", lengths="[B, H]", cu_seqlens="[B * H + 1]")


def check_parts(parts: dict[str, Tensor], companions: Sequence[Tensor]) -> None:
    """Raises unless shapes, dtypes and devices are those of packed rows of one layer. Reads no values."""
    named = parts | {f"companions[{i}]": c for i, c in enumerate(companions)}
    for name, t in named.items():
        if not isinstance(t, Tensor) or t.layout is not torch.strided or t.is_quantized:
            raise TypeError(f"expected {name} as a dense tensor, got {getattr(t, 'layout', type(t).__name__)}")
        if t.device != parts["k"].device:
            raise ValueError(f"expected {name} on {parts['k'].device}, got {t.device}")
        if name in INTEGERS and t.dtype != torch.int32:
            raise TypeError(f"expected {name} of dtype int32, got {t.dtype}")
    k, v, positions, lengths, cu_seqlens = parts.values()
    if k.dim() != 2 or v.dim() != 2 or positions.dim() != 1 or lengths.dim() != 2:
        got = {name: list(t.shape) for name, t in parts.items()}
        raise ValueError(f"expected packed k and v of one layer, got {got}")
    if cu_seqlens.shape != (lengths.numel() + 1,):
        raise ValueError(
            f"expected cu_seqlens of shape [B * H + 1] = [{lengths.numel() + 1}], got {list(cu_seqlens.shape)}"
        )
    for name, t in named.items():
        if name not in ("lengths", "cu_seqlens") and t.shape[:1] != k.shape[:1]:
            raise ValueError(f"expected {name} of T = {k.shape[0]} rows as in k, got {list(t.shape)}")


def check_counts(counts: dict[str, int], facts: spans.Facts, rows: int) -> None:
    """Raises unless the counts of a cache are true of its spans; `rows`: T."""
    most = dict(seen=MOST, max_length=counts["seen"] + rows, _free=facts.slack, _tail=facts.tail, _reserve=MOST // 2)
    least = dict(max_length=facts.longest, _reserve=1, align=1)
    for name in COUNTS:
        low, high = least.get(name, 0), most.get(name, MOST)
        if not low <= counts[name] <= high:
            raise ValueError(f"expected {name.lstrip('_')} in [{low}, {high}], got {counts[name]}")


def state_of(cache: Any) -> dict[str, Any]:
    """The state of a cache, its tensors without the memory around them."""
    state: dict[str, Any] = {name: _compact(getattr(cache, name)) for name in PARTS}
    state["companions"] = tuple(map(_compact, cache.companions))
    return state | {name: getattr(cache, name) for name in COUNTS}


def check_state(state: dict[str, Any]) -> None:
    """Raises unless `state` is that of a cache."""
    missing = {*PARTS, *COUNTS, "companions"} ^ state.keys()
    if missing:
        raise ValueError(f"expected the state of a cache, got one that differs in {sorted(missing)}")
    parts, counts = {name: state[name] for name in PARTS}, {name: state[name] for name in COUNTS}
    check_parts(parts, state["companions"])
    if any(type(count) is not int for count in counts.values()):
        raise TypeError(f"expected counts that are ints, got {counts}")
    check_counts(counts, spans.read(parts, counts["align"], counts["seen"]), parts["k"].shape[0])


def save(cache: Any, path: str | PathLike[str]) -> None:
    """Writes a cache as safetensors: tensors as they are, counts in the metadata."""
    tensors = {name: getattr(cache, name).contiguous() for name in PARTS}
    tensors |= {f"companions.{i}": c.contiguous() for i, c in enumerate(cache.companions)}
    _safetensors().save_file(tensors, path, {name: str(getattr(cache, name)) for name in COUNTS})


def load(path: str | PathLike[str]) -> dict[str, object]:
    """The state that `save` wrote, on the CPU. Raises ValueError where the file does not have the parts of one."""
    library, path = _safetensors(), os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"expected a file, got the folder {path}")
    try:
        with library.safe_open(path, "pt", device="cpu") as file:
            # Cloned: otherwise they are pages of the file, which may be overwritten or removed.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except import_module("safetensors").SafetensorError as error:
        raise ValueError(f"expected a whole safetensors file, got {path}: {error}") from None
    companions = [f"companions.{i}" for i in range(len(tensors) - len(PARTS))]
    if tensors.keys() != {*PARTS, *companions}:
        raise ValueError(f"expected a saved cache, got tensors {sorted(tensors)}")
    state: dict[str, object] = {name: tensors[name] for name in PARTS}
    state["companions"] = tuple(tensors[name] for name in companions)
    for name in COUNTS:
        text = metadata.get(name, "1" if name == "align" else "")
        if not text.isdecimal() or len(text) > 18:
            raise ValueError(
                f"expected a saved cache, with {name.lstrip('_')} as a count in its metadata, got {text!r}"
            )
        state[name] = int(text)
    return state


def _compact(t: Tensor) -> Tensor:
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def _safetensors() -> ModuleType:
    try:
        return import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise ImportError("lkv_ext.RaggedCache: saving and loading need: pip install safetensors") from None
