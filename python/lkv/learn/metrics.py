"""The numbers of a training run, step by step: lines of JSON, and TensorBoard's event files where it is installed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class Metrics:
    """No step has two lines in `metrics.jsonl`, also in a run that was interrupted.

    Args:
        folder: of the run; it is there when the first step is added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._board: Any = None

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        with (self.folder / METRICS).open("a") as file:
            print(json.dumps({"step": step, **numbers}), file=file)
        if self._board is None:
            self._board = _board(self.folder)
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def take_back(self, step: int) -> None:
        """Takes out the lines of later steps, which are done again, and what is no whole line."""
        path = self.folder / METRICS
        if path.exists():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            temporary = self.folder / (METRICS + ".part")
            temporary.write_text("".join(line for line in lines if line.endswith("\n") and _step_of(line) <= step))
            os.replace(temporary, path)


def _step_of(line: str) -> float:
    """Infinite for a line that was torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class _Nowhere:
    """TensorBoard where there is none."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return _Nowhere()
    return SummaryWriter(str(folder / "tensorboard"))
