"""Runs tests in a copy of the tree, in forks of one process that has imported torch, transformers and pytest already.

Nothing of the project is imported before a fork, so that every run sees the sources of its own copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import tree

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
_PR_SET_PDEATHSIG = 1
_BROKEN = 70  # exit code of a fork in which the runner failed, not the tests


@dataclass(frozen=True)
class Job:
    """Tests to be run, up to the first failure, where `file` reads `text` (None: as it is)."""

    tests: tuple[str, ...]
    left_out: tuple[str, ...] = ()  # of these tests
    file: str = ""
    text: str | None = None
    limit: float = 120.0  # seconds for one of them, and for what pytest does before the first
    subject: object = None  # comes back with the outcome


@dataclass(frozen=True)
class Outcome:
    job: Job
    result: str
    by: str  # the test that failed, or what else ended the run
    seconds: float
    slowest: float = 0.0  # seconds of the test that took longest
    modules: tuple[str, ...] = ()  # of the shared packages that the tests imported
    output: str = ""


class _Recorder:
    """The first failure of a run. A test that takes longer than its limit ends the process, as it may not come back."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit = path, limit
        self.failed, self.slowest = "", 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.write(item.nodeid)
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self.limit)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, self.limit)
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"

    def write(self, by: str, modules: Iterable[str] = ()) -> None:
        self.path.write_text(json.dumps({"by": by, "slowest": self.slowest, "modules": list(modules)}))


# Packages that are imported before a fork, with what the tests need of them. Others may start threads when they are
# imported, as pyarrow does, and a process with threads is not forked.
SHARED = ("torch", "numpy", "hypothesis", "transformers", "tokenizers", "accelerate", "safetensors", "peft")
_tried: set[str] = set()


def preload(modules: Iterable[str]) -> None:
    """Imports modules of the shared packages, once. One that does not go is left to the tests."""
    new = [x for x in modules if x.split(".")[0] in SHARED and x not in sys.modules and x not in _tried]
    _tried.update(new)
    for name in new:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if new:
        gc.collect()
        gc.freeze()  # forks share the pages as long as the collector leaves them alone
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import started threads: a fork of this process could hang")


def run_all(jobs: Iterable[Job], copies: list[Path], stop: Callable[[], bool] = lambda: False) -> Iterator[Outcome]:
    """Outcomes as they come, one job at a time in each copy of the tree, until `stop()` says that time is up."""
    waiting, free, running = iter(jobs), list(copies), {}
    try:
        while True:
            while free and not stop() and (job := next(waiting, None)) is not None:
                root = free.pop()
                hold = tree.mutated(root, job.file, job.text)
                hold.__enter__()
                running[_fork(job, root)] = (job, root, hold, time.monotonic())
            if not running:
                return
            for pid, (job, root, hold, begun) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    _end_group(pid)
                    hold.__exit__(None, None, None)
                    del running[pid]
                    free.append(root)
                    yield _outcome(job, root, status, time.monotonic() - begun)
            time.sleep(0.02)
    finally:
        for pid, (_, _, hold, _) in running.items():
            _end_group(pid)
            os.waitpid(pid, 0)
            hold.__exit__(None, None, None)


def _end_group(pid: int) -> None:
    """Ends what the tests started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _report_of(root: Path) -> Path:
    return root.with_suffix(".json")


def _output_of(root: Path) -> Path:
    return root.with_suffix(".out")


def _fork(job: Job, root: Path) -> int:
    _report_of(root).unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        code = _BROKEN
        try:
            _lead_group(0)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # tests do not outlive the runner
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = _run(job, root)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _lead_group(pid)
    return pid


def _lead_group(pid: int) -> None:
    """Makes the fork the head of a group of its own. Both sides say so, as either may be first."""
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)


def _run(job: Job, root: Path) -> int:
    """In the fork: the tests, with the sources of `root`, and a report of them."""
    output = os.open(_output_of(root), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(root)
    paths = tree.import_path(root)
    here = os.fspath(Path(__file__).resolve().parent.parent)
    sys.path[:] = paths + [x for x in sys.path if os.path.abspath(x) != here]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.dont_write_bytecode = True
    for package, folder in zip(tree.PACKAGES, paths, strict=True):
        if (Path(folder) / package).is_dir():
            found = importlib.util.find_spec(package)
            if package in sys.modules or not found or not found.origin.startswith(folder):
                raise RuntimeError(f"{package} is not imported from {folder}")
    recorder = _Recorder(_report_of(root), job.limit)
    recorder.write("before the first test")
    signal.setitimer(signal.ITIMER_REAL, job.limit)
    left_out = [f"--deselect={x}" for x in job.left_out]
    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *left_out, *job.tests], plugins=[recorder]))
    signal.setitimer(signal.ITIMER_REAL, 0)
    recorder.write(recorder.failed, [x for x in list(sys.modules) if x.split(".")[0] in SHARED])
    return code


def _outcome(job: Job, root: Path, status: int, seconds: float) -> Outcome:
    code = os.waitstatus_to_exitcode(status)
    report = json.loads(_report_of(root).read_text()) if _report_of(root).exists() else {}
    output = _output_of(root).read_text(errors="replace") if _output_of(root).exists() else ""
    if code == _BROKEN:
        raise RuntimeError(f"the run of {job.tests} did not get as far as pytest:\n{output}")
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"expected tests in {job.tests}, got none that can run here:\n{output}")
    by = report.get("by", "")
    late = -code == signal.SIGALRM
    if code < 0 and not late:
        by = f"{by} (ended by signal {-code})"
    result = TIMED_OUT if late else PASSED if code == 0 else FAILED
    by = "" if result == PASSED else by or f"pytest's exit code {code}"
    return Outcome(job, result, by, seconds, report.get("slowest", 0.0), tuple(report.get("modules", ())), output)
