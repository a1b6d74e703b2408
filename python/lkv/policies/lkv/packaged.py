"""Checkpoints that come with the package, in folders named as models are in `lkv.models`, or MODEL-KIND for another."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "checkpoints"


def names() -> list[str]:
    """Of the checkpoints."""
    return sorted(path.name for path in FOLDER.glob("*") if path.is_dir())


def find(name: str | os.PathLike[str]) -> Path | None:
    """The folder of the checkpoint of this name; None where there is none."""
    return FOLDER / name if os.fspath(name) in names() else None
