"""Loads the op library."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def _load() -> None:
    # LKV_LIBRARY: another build of the same library, for example one made elsewhere for this machine's GPU.
    path = Path(os.environ.get("LKV_LIBRARY", Path(__file__).parents[1] / "_torch.so"))
    if not path.exists():
        raise ImportError(
            f"lkv_ext: {path} does not exist: lkv-ext was built where there was no torch. "
            "Install torch, then lkv-ext again: pip install --no-build-isolation --force-reinstall lkv-ext"
        )
    torch.ops.load_library(path)


_load()
ops = torch.ops.lkv_ext
