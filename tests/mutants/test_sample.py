"""A small sample of mutants, of all areas: the tests notice each of them. `make mutants` tries the large one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
# A mutant's place in the sample depends on nothing but its own lines: a change to a line brings at most its own in.
SAMPLE = ("--count", "24", "--seed", "1", "--workers", "1", "--minutes", "2", "--skip-clean", "--anew")


def test_a_sample_is_noticed() -> None:
    """A survivor here is in lines that were changed: a test is missing, or an entry of equivalent/."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "mutants", *SAMPLE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "survived:" not in done.stdout, done.stdout[-6000:] + done.stderr[-3000:]
