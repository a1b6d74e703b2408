"""The launchers of csrc/cuda against an oracle: upload, spans, select, gather behind it, compact, and other ops."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.build import SCHEDULES, run_cases

BATCH = 60
BATCHES = 4
OTHER_CASES = {"compact": 150, "append": 150, "attend": 60, "soft_topk": 60}


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cases(sanitized: Path, schedule: str, batch: int) -> None:
    repeats = 1 if schedule in ("in_order", "reversed") else 2  # the others differ by seed
    done = run_cases(sanitized, "evict", batch * BATCH, BATCH, (schedule,) * repeats, batch, sanitize=True)
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.mark.parametrize("suite", ["evict", "compact"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cases_with_old_values(weak: Path, schedule: str, suite: str) -> None:
    """Plain loads see what other grids have written only behind a wait or an acquire."""
    done = run_cases(weak, suite, 1000, 40, (schedule,), 0, sanitize=False)
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.mark.parametrize("suite", OTHER_CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_other_cases(sanitized: Path, schedule: str, suite: str) -> None:
    done = run_cases(sanitized, suite, 0, OTHER_CASES[suite], (schedule,), 0, sanitize=True)
    assert done.returncode == 0, done.stderr[-8000:]
