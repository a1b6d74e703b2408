"""Loads the op library."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lkv_ext._common.unbuilt import PACKAGE, missing


def _load() -> None:
    # LKV_LIBRARY: another build of the same library, for example one made elsewhere for this machine's GPU.
    path = Path(os.environ.get("LKV_LIBRARY", PACKAGE / "_torch.so"))
    if "LKV_LIBRARY" in os.environ and not path.exists():
        raise ImportError(f"lkv_ext: expected LKV_LIBRARY to be a file, got {path}")
    if not path.exists():
        raise missing(
            "_torch.so",
            "lkv-ext was built where there was no torch. Install torch, then lkv-ext again: pip install "
            "--no-build-isolation --force-reinstall lkv-ext",
        )
    torch.ops.load_library(path)


_load()
ops = torch.ops.lkv_ext
