"""What all benchmarks share: options, warm memory, the clock of each device, one line per shape, in JSON at once."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import rivals
import torch
from results import Result, Run, machine, slug
from shapes import Shape
from timing import Call, Clock, CudaClock, WallClock, captured, take_turns

MODES = ("fresh", "warm", "graph")
T = TypeVar("T")
STATE = pytest.StashKey["State"]()


def each(names: str, *values: object) -> pytest.MarkDecorator:
    """A test for each of the values; shapes are named as in the results."""
    return pytest.mark.parametrize(names, values, ids=str)


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("lkv_ext benchmarks").addoption
    add("--device", choices=("cpu", "cuda", "all"), default="all", help="default: all that are present")
    add("--seconds", type=float, default=2.0, help="time per case")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--warm-gigabytes", type=float, default=6.0, help="host memory touched before the first case")
    add("--rivals", choices=("torch", "all"), default="all", help="on CUDA: others than PyTorch too")
    where = "folder for cpu-<instruction set>.json or <gpu name>.json"
    add("--results", type=Path, default=Path(__file__).with_name("results"), help=where)
    add("--keep", action="store_true", help="keep what the file has of the same code and machine")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STATE] = State(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("device")
        present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        metafunc.parametrize("device", [d for d in present if wanted in (d, "all")])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A graph is a thing of CUDA."""
    params = [(item, item.callspec.params if hasattr(item, "callspec") else {}) for item in items]
    items[:] = [item for item, case in params if (case.get("device"), case.get("mode")) != ("cpu", "graph")]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    return ("passed", "", "") if report.when == "call" and report.passed else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    for run, path in session.config.stash[STATE].runs.values():
        session.config.stash[STATE].print(f"{len(run.results)} results in {path}")


class State:
    """The results of every device, in their file from the moment that each is known, and the rivals left out."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.runs: dict[str, tuple[Run, Path]] = {}
        self.skipped: dict[str, None] = {}
        self.uncapturable: set[str] = set()

    def open(self, device: str) -> None:
        if device in self.runs:
            return
        path, run = self.config.getoption("results") / f"{slug(device)}.json", Run(device, machine(device), [])
        if self.config.getoption("keep") and path.exists() and run.goes_on_with(earlier := Run.read(path)):
            run.results = earlier.results
            self.skipped |= dict.fromkeys(earlier.machine.get("rivals skipped", ()))
        if device == "cuda":
            run.machine["rivals"] = rivals.versions()
        self.runs[device] = run, path

    def add(self, device: str, result: Result) -> None:
        run, path = self.runs[device]
        run.add(result)
        if device == "cuda":
            run.machine["rivals skipped"] = list(self.skipped)
        run.write(path)
        self.print(result.line())

    def skip(self, name: str, why: str) -> None:
        line = f"{name} skipped: {why}"
        if line not in self.skipped:
            self.skipped[line] = None
            self.print(line)

    def print(self, line: str) -> None:
        with self.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            self.config.pluginmanager.get_plugin("terminalreporter").write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _settled(request: pytest.FixtureRequest) -> None:
    """The first pass over new guest memory is ten times slower than any later one; nobody should pay for it here.

    In huge pages: evict takes such, and the guest has them elsewhere than the small ones that the rivals get.
    """
    torch.set_num_threads(request.config.getoption("threads"))
    size = int(request.config.getoption("warm_gigabytes") * 2**30)
    if size == 0:
        return
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


class Bench:
    """Measures the cases of one device and reports each at once."""

    def __init__(self, config: pytest.Config, benchmark: Any, device: str) -> None:
        self.device = device
        self._benchmark = benchmark
        self._seconds = config.getoption("seconds")
        self._everybody = device == "cuda" and config.getoption("rivals") == "all"
        self._state = config.stash[STATE]
        self._state.open(device)

    def time(self, op: str, mode: str, shape: Shape, subject: Call, others: dict[str, Call], moved: int) -> None:
        self.report(self.measure(op, mode, shape, subject, others, moved))

    def measure(self, op: str, mode: str, shape: Shape, subject: Call, others: dict[str, Call], moved: int) -> Result:
        """Times `subject` beside others; `moved`: bytes that the op must read and write, 0: none are counted."""
        clock: Clock = WallClock(cold=mode == "cold")
        if self.device == "cuda":
            # The caching allocator gives warm memory to everybody: what differs is the L2 cache.
            clock = CudaClock(cold=mode != "warm")
            if mode in ("warm", "graph"):
                subject, others = captured(subject), self._captured(others)
            mode = {"fresh": "cold"}.get(mode, mode)
        found = take_turns(self._benchmark, subject, others, clock, self._seconds)
        gbps = moved / found["us"] / 1e3 if moved else None
        return Result(op, mode, str(shape), gbps=gbps, length=shape.length, retention=shape.retention, **found)

    @property
    def sweep(self) -> str:
        """The mode of shapes that are measured in one mode only."""
        return "graph" if self.device == "cuda" else "fresh"

    def admit(
        self, makers: Callable[[], dict[str, rivals.Maker]], inputs: Any, right: Callable[[Any], bool]
    ) -> dict[str, Call]:
        """On CUDA the rivals that are there; names once those that are missing, and why.

        `makers` is called there alone: to name CUB's, its library is compiled.
        """
        if not self._everybody:
            return {}
        calls, missing = rivals.admit(makers(), inputs, right)
        for name, why in missing.items():
            self._state.skip(name, why)
        return calls

    def _captured(self, calls: dict[str, Call]) -> dict[str, Call]:
        graphs = {}
        # Once a capture fails, some versions of torch fail in all that follow: who may not capture comes last, once.
        for name in sorted(calls, key=lambda name: name in rivals.MAY_NOT_CAPTURE):
            if name not in self._state.uncapturable:
                try:
                    graphs[name] = captured(calls[name])
                except RuntimeError as error:
                    self._state.uncapturable.add(name)
                    self._state.skip(f"{name} in a graph", rivals.reason(error))
        return graphs

    def once(self, call: Callable[[], T]) -> T:
        """For what is not timed."""
        return self._benchmark.pedantic(call, rounds=1, iterations=1)

    def report(self, result: Result) -> None:
        self._state.add(self.device, result)
        self._benchmark.extra_info.update(case=result.case, **vars(result))


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, device: str) -> Iterator[Bench]:
    with torch.inference_mode():
        yield Bench(request.config, benchmark, device)
