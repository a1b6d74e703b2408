"""What all benchmarks share: options, warm memory, the clock of each device, one line per shape, in JSON at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import contenders
import pytest
import torch
from contenders import Field, reason, versions
from results import Result, Run, machine
from shapes import Shape
from timing import Call, Clock, CudaClock, WallClock, captured, take_turns

HERE = Path(__file__).parent
T = TypeVar("T")
RUNS = pytest.StashKey[dict[str, "Book"]]()
SKIPPED = pytest.StashKey[dict[str, None]]()
UNCAPTURABLE = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lkv_ext benchmarks")
    group.addoption("--device", choices=("cpu", "cuda", "all"), default="all", help="default: all that are present")
    group.addoption("--seconds", type=float, default=2.0, help="time per case")
    group.addoption("--threads", type=int, default=2, help="CPU threads")
    group.addoption("--warm-gigabytes", type=float, default=6.0, help="host memory touched before the first case")
    group.addoption("--rivals", choices=("torch", "all"), default="all", help="on CUDA: others than PyTorch too")
    group.addoption(
        "--results",
        type=Path,
        default=HERE / "results",
        help="folder for cpu-<instruction set>.json or <gpu name>.json",
    )
    group.addoption("--keep", action="store_true", help="keep what the file has of the same code and machine")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUNS] = {}
    config.stash[SKIPPED] = {}
    config.stash[UNCAPTURABLE] = set()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        asked = metafunc.config.getoption("device")
        present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        metafunc.parametrize("device", [d for d in present if asked in (d, "all")])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A graph is a thing of CUDA."""
    drawn = [(item, item.callspec.params if hasattr(item, "callspec") else {}) for item in items]
    items[:] = [item for item, case in drawn if (case.get("device"), case.get("mode")) != ("cpu", "graph")]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    return ("passed", "", "") if report.when == "call" and report.passed else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for book in session.config.stash[RUNS].values():
        reporter.write_line(f"{len(book.run.results)} results in {book.path}")


class Book:
    """The results of one device, in their file from the moment that each is known."""

    def __init__(self, device: str, config: pytest.Config) -> None:
        found = machine(device)
        set_ = found.get("cpu_isa", "unknown")
        name = f"cpu-{set_}" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
        self.path = config.getoption("results") / f"{name}.json"
        self.run = Run(device, found, [])
        self._skipped = config.stash[SKIPPED]
        if config.getoption("keep") and self.path.exists():
            earlier = Run.read(self.path)
            if self.run.goes_on_with(earlier):
                self.run.results = earlier.results
                self._skipped |= dict.fromkeys(earlier.machine.get("rivals skipped", ()))
        if device == "cuda":
            self.run.machine["rivals"] = versions()

    def add(self, result: Result) -> None:
        self.run.add(result)
        if self.run.device == "cuda":
            self.run.machine["rivals skipped"] = list(self._skipped)
        self.run.write(self.path)


@pytest.fixture(scope="session", autouse=True)
def _settled(request: pytest.FixtureRequest) -> None:
    """The first pass over new guest memory is ten times slower than any later one; nobody should pay for it here."""
    torch.set_num_threads(request.config.getoption("threads"))
    torch.empty(int(request.config.getoption("warm_gigabytes") * 2**30), dtype=torch.uint8).fill_(1)


class Bench:
    """Measures the cases of one device and reports each at once."""

    def __init__(self, request: pytest.FixtureRequest, benchmark: Any, device: str) -> None:
        self.device = device
        self._benchmark = benchmark
        self._seconds = request.config.getoption("seconds")
        self._everybody = device == "cuda" and request.config.getoption("rivals") == "all"
        runs = request.config.stash[RUNS]
        self._book = runs[device] if device in runs else runs.setdefault(device, Book(device, request.config))
        self._skipped = request.config.stash[SKIPPED]
        self._uncapturable = request.config.stash[UNCAPTURABLE]
        self._reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        self._capture = request.config.pluginmanager.get_plugin("capturemanager")

    def time(
        self,
        op: str,
        mode: str,
        shape: Shape,
        subject: Call,
        rivals: dict[str, Call],
        moved: int,
        *,
        note: Callable[[dict[str, float]], str] | None = None,
    ) -> Result:
        """Times `subject` beside its rivals.

        Args:
            moved: bytes that the op must read and write; 0: none said.
            note: from the ratios to what else is to be said.
        """
        clock: Clock = WallClock(cold=mode == "cold")
        if self.device == "cuda":
            # The caching allocator gives warm memory to everybody: what differs is the L2 cache.
            clock = CudaClock(cold=mode != "warm")
            if mode in ("warm", "graph"):
                subject, rivals = captured(subject), self._captured(rivals)
            mode = {"fresh": "cold"}.get(mode, mode)
        samples = take_turns(self._benchmark, subject, rivals, clock, self._seconds)
        result = Result(
            op,
            mode,
            str(shape),
            us=1e6 * samples.seconds,
            gbps=moved / samples.seconds / 1e9 if moved else None,
            ratios=samples.ratios(),
            rival_us=samples.rival_us(),
            rounds=len(samples.subject),
            length=shape.length,
            retention=shape.retention,
        )
        if note is not None:
            result.note = note(result.ratios)
        self.report(result)
        return result

    @property
    def sweep(self) -> str:
        """The mode of shapes that are measured in one mode only."""
        return "graph" if self.device == "cuda" else "fresh"

    def admit(self, field: Callable[[], Field]) -> dict[str, Call]:
        """On CUDA the rivals that are there; says once who is missing and why."""
        if not self._everybody:
            return {}
        found = field()
        for name, why in found.skipped.items():
            self._skip(name, why)
        return found.calls

    def _captured(self, calls: dict[str, Call]) -> dict[str, Call]:
        graphs = {}
        # Once a capture fails, some versions of torch fail in all that follow: who may not capture comes last, once.
        for name in sorted(calls, key=lambda name: name in contenders.MAY_NOT_CAPTURE):
            call = calls[name]
            if name in self._uncapturable:
                continue
            try:
                graphs[name] = captured(call)
            except RuntimeError as error:
                self._uncapturable.add(name)
                self._skip(f"{name} in a graph", reason(error))
        return graphs

    def _skip(self, name: str, why: str) -> None:
        line = f"{name} skipped: {why}"
        if line not in self._skipped:
            self._skipped[line] = None
            self._say(line)

    def once(self, call: Callable[[], T]) -> T:
        """For what is not timed."""
        return self._benchmark.pedantic(call, rounds=1, iterations=1)

    def report(self, result: Result) -> None:
        self._book.add(result)
        self._benchmark.extra_info.update(case=result.case, **vars(result))
        self._say(result.line())

    def _say(self, line: str) -> None:
        with self._capture.global_and_fixture_disabled():
            self._reporter.write_line(line)


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, device: str) -> Iterator[Bench]:
    with torch.inference_mode():
        yield Bench(request, benchmark, device)
