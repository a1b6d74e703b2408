"""The emulator itself: every planted bug is caught under some schedule, its correct twin passes under all."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.build import SCHEDULES, run_planted

SEEDS = (1, 2, 3)

# toy: what the report says when the bug is caught
PLANTED = {
    "block_barrier": "wrong results",
    "warp_barrier": "wrong results",
    "cluster_barrier": "use-after-poison",
    "cluster_exit": "shared memory of an exited block",
    "shared_bounds": "heap-buffer-overflow",
    "global_bounds": "heap-buffer-overflow",
    "stale_shuffle": "stale shuffle",
    "divergent_ballot": "__ballot_sync",
    "divergent_barrier": "deadlock",
    "barrier_elsewhere": "divergent block barrier",
    "flag_wait": "wrong results",
    "dependency_wait": "wrong results",
    "livelock": "livelock",
}


@pytest.mark.parametrize("toy", PLANTED)
def test_correct_version_passes_everywhere(sanitized: Path, toy: str) -> None:
    for schedule in SCHEDULES:
        for seed in SEEDS:
            done = run_planted(sanitized, toy, "correct", schedule, seed)
            assert done.returncode == 0, f"{schedule}, seed {seed}: {done.stderr}"


@pytest.mark.parametrize("toy", PLANTED)
def test_planted_bug_is_caught(sanitized: Path, toy: str) -> None:
    runs = [run_planted(sanitized, toy, "broken", schedule, seed) for schedule in SCHEDULES for seed in SEEDS]
    reports = [run.stderr for run in runs if run.returncode != 0]
    assert any(PLANTED[toy] in report for report in reports), f"no schedule shows it: {reports}"


def test_report_names_threads_and_places(sanitized: Path) -> None:
    report = run_planted(sanitized, "divergent_barrier", "broken", "in_order", 1).stderr
    assert "block (0, 0, 0) threads 0-39: block barrier at" in report
    assert "divergent_barrier.cu:" in report
    assert "block (0, 0, 0) threads 40-63: exited" in report


def test_a_seed_repeats(sanitized: Path) -> None:
    first, second = (run_planted(sanitized, "flag_wait", "broken", "priority_changes", 5) for _ in range(2))
    assert (first.returncode, first.stderr) == (second.returncode, second.stderr)
