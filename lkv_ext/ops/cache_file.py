"""A RaggedCache as a safetensors file: its tensors, and its counts as metadata."""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from lkv_ext.ops.ragged import RaggedKV

if TYPE_CHECKING:
    from lkv_ext.ops.cache import RaggedCache

PARTS = ("k", "v", "positions", "lengths", "cu_seqlens")
COUNTS = ("seen", "max_length", "_free", "_tail", "_reserve", "align")


def save(cache: RaggedCache, path: str | PathLike[str]) -> None:
    tensors = {name: getattr(cache, name).contiguous() for name in PARTS}
    tensors |= {f"companions.{i}": c.contiguous() for i, c in enumerate(cache.companions)}
    _safetensors().save_file(tensors, path, {name: str(getattr(cache, name)) for name in COUNTS})


def load(cls: type[RaggedCache], path: str | PathLike[str], device: torch.device | str) -> RaggedCache:
    with _safetensors().safe_open(path, "pt", device=str(device)) as file:
        names, counts = set(file.keys()), {"align": "1"} | (file.metadata() or {})
        companions = [name for name in (f"companions.{i}" for i in range(len(names))) if name in names]
        if names != {*PARTS, *companions} or not counts.keys() >= set(COUNTS):
            raise ValueError(f"lkv_ext.RaggedCache.load: expected a saved cache, got tensors {sorted(names)}")
        parts = {name: file.get_tensor(name) for name in PARTS}
        kv = RaggedKV(**parts, companions=tuple(map(file.get_tensor, companions)), max_length=0)
    cache = cls(kv, 0, free=0)
    for name in COUNTS:
        setattr(cache, name, int(counts[name]))
    return cache


def _safetensors() -> ModuleType:
    try:
        return import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise ImportError("lkv_ext.RaggedCache: saving and loading need: pip install safetensors") from None
