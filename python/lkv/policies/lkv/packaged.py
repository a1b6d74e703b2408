"""Checkpoints that come with the package: a folder for each model that has one, of its name in `lkv.models`."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "checkpoints"


def names() -> list[str]:
    """Of the models that have a checkpoint here."""
    return sorted(path.name for path in FOLDER.glob("*") if path.is_dir())


def find(name: str | os.PathLike[str]) -> Path | None:
    """The folder of the checkpoint for the model of this name; None where there is none."""
    return FOLDER / name if os.fspath(name) in names() else None
