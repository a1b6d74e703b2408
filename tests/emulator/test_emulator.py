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
    "old_cluster": "wrong results",
}
# Those that only old values of plain loads show.
WEAK = {"weak_offset": "wrong results", "weak_lanes": "wrong results", "old_code": "wrong results"}


def check_correct(folder: Path, toy: str) -> None:
    for schedule in SCHEDULES:
        for seed in SEEDS:
            done = run_planted(folder, toy, "correct", schedule, seed)
            assert done.returncode == 0, f"{schedule}, seed {seed}: {done.stderr}"


def reports_of(folder: Path, toy: str) -> list[str]:
    """What runs with the bug say that fail."""
    runs = [run_planted(folder, toy, "broken", schedule, seed) for schedule in SCHEDULES for seed in SEEDS]
    return [run.stderr for run in runs if run.returncode != 0]


@pytest.mark.parametrize("toy", [*PLANTED, *WEAK])
def test_correct_version_passes_everywhere(sanitized: Path, toy: str) -> None:
    check_correct(sanitized, toy)


@pytest.mark.parametrize("toy", PLANTED)
def test_planted_bug_is_caught(sanitized: Path, toy: str) -> None:
    reports = reports_of(sanitized, toy)
    assert any(PLANTED[toy] in report for report in reports), f"no schedule shows it: {reports}"


@pytest.mark.parametrize("toy", [*(toy for toy in PLANTED if PLANTED[toy] == "wrong results"), *WEAK])
def test_correct_version_passes_with_old_values(weak: Path, toy: str) -> None:
    check_correct(weak, toy)


@pytest.mark.parametrize("toy", WEAK)
def test_planted_bug_is_caught_by_old_values_alone(sanitized: Path, weak: Path, toy: str) -> None:
    assert not reports_of(sanitized, toy)
    reports = reports_of(weak, toy)
    assert any(WEAK[toy] in report for report in reports), f"no schedule shows it: {reports}"


def test_report_names_threads_and_places(sanitized: Path) -> None:
    report = run_planted(sanitized, "divergent_barrier", "broken", "in_order", 1).stderr
    assert "block (0, 0, 0) threads 0-39: block barrier at" in report
    assert "divergent_barrier.cu:" in report
    assert "block (0, 0, 0) threads 40-63: exited" in report


def test_a_seed_repeats(sanitized: Path) -> None:
    first, second = (run_planted(sanitized, "flag_wait", "broken", "priority_changes", 5) for _ in range(2))
    assert (first.returncode, first.stderr) == (second.returncode, second.stderr)
