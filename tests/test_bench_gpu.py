"""bench/gpu.py keeps what it has when it is cut off; tried by a dry run, which needs no GPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
from results import Result, Run, merge  # noqa: E402

DRY = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--dry-run", "--results"]
# A worker of pytest-xdist says so in its environment, and pytest-benchmark measures nothing in one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
ENVIRONMENT["LKV_COMMIT"] = "tested"  # whatever is committed meanwhile: results of another commit are not added to


def read(folder: Path) -> dict[str, Result]:
    """The results of the one file that there is by then, by case."""
    return {
        r.case: r for path in folder.glob("cpu-*.json") if "checks" not in path.name for r in Run.read(path).results
    }


def states(folder: Path) -> dict[str, str]:
    (path,) = folder.glob("cpu-*-checks.json")
    return {step["step"]: step["state"] for step in json.loads(path.read_text())["steps"]}


def kill_with_children(pid: int) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has just ended by itself
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
        for child in children:
            kill_with_children(int(child))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes to end in /proc")
def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path: Path) -> None:
    with subprocess.Popen([*DRY, tmp_path], env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 240
        while len(read(tmp_path)) < 3 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        kill_with_children(process.pid)
    kept = read(tmp_path)
    assert len(kept) >= 3 and all(result.us > 0 for result in kept.values())
    assert states(tmp_path)["bench-evict"] == "cut off"

    # Another command adds its cases; the step that was cut off stays so.
    part = ["--steps", "bench-rivals", "--select=-k4096 and not layers"]
    done = subprocess.run([*DRY, tmp_path, *part], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert states(tmp_path) == {**dict.fromkeys(("build", "tests", "sanitizer"), "skipped"),
                                "bench-evict": "cut off", "bench-rivals": "passed"}  # fmt: skip
    both = read(tmp_path)
    assert kept.keys() < both.keys() and any(case.startswith("select") for case in both)
    assert list(tmp_path.glob("cpu-*.md"))


def test_steps_fit_a_command_of_ten_minutes_and_are_named() -> None:
    text = gpu.plan(list(gpu.STEPS))
    for name, step in gpu.STEPS.items():
        assert step.minutes <= 10 and f"{name:<12} about {step.minutes:2} min" in text
    assert gpu.parse([]).limit < 600
    assert list(gpu.STEPS)[-1] == "bench-rivals"


def run_of(*results: Result, commit: str = "a") -> Run:
    return Run("cuda", {"gpu": "NVIDIA H200", "commit": commit}, list(results))


def test_runs_are_merged_by_union() -> None:
    both = run_of(Result("evict", "graph", "x", us=1.0, ratios={"a": 2.0}), Result("select", "graph", "x", us=5.0))
    more = run_of(
        Result("evict", "graph", "x", us=3.0, ratios={"a": 4.0, "b": 7.0}), Result("gather", "graph", "x", us=6.0)
    )
    merged = merge([both, more])
    assert {r.case: r.us for r in merged.results} == {"evict graph x": 2, "select graph x": 5, "gather graph x": 6}
    assert merged.find("evict graph x").ratios == {"a": 3, "b": 7}


def test_a_later_result_of_a_case_counts_and_other_code_is_another_run() -> None:
    run = run_of(Result("evict", "graph", "x", us=1.0))
    run.add(Result("evict", "graph", "x", us=2.0))
    run.add(Result("evict", "graph", "y", us=3.0))
    assert [r.us for r in run.results] == [2, 3]
    assert run.goes_on_with(run_of()) and not run.goes_on_with(run_of(commit="b"))


def test_a_sanitizer_that_hangs_is_a_step_without_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("compute-sanitizer", 180)

    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(gpu.subprocess, "run", hangs)
    outcome = gpu.sanitizer(gpu.Machine(gpu.parse([]), {}))
    assert outcome.state == "skipped" and "180 s" in outcome.detail


def test_memcheck_runs_without_the_cache_and_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {}

    def runs(_: gpu.Machine, step: str, command: list[str], limit: float, **environment: str) -> gpu.Outcome:
        commands[command[2]] = (command, environment)
        return gpu.Outcome(step, "passed", 0.0, "")

    probed = subprocess.CompletedProcess([], 0, "probed", "")
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: probed)
    monkeypatch.setattr(gpu.Machine, "run", runs)
    gpu.sanitizer(gpu.Machine(gpu.parse([]), {}))
    (memcheck, alone), (racecheck, cached) = commands["memcheck"], commands["racecheck"]
    assert alone == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} and "not graph" in " ".join(memcheck)
    assert cached == {} and "not graph" not in " ".join(racecheck)
