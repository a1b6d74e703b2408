"""A whole run on a GPU: build, GPU tests, compute-sanitizer, benchmarks, table, in steps of at most ten minutes each.

    python bench/gpu.py                                     builds for the GPU at hand and does everything
    python bench/gpu.py --library path/to/_torch.so         with an op library built elsewhere; needs no compiler
    python bench/gpu.py --steps tests sanitizer             parts of it, where a command may only take so long
    python bench/gpu.py --dry-run                           no GPU: the same on a few small cases of this CPU

Writes `bench/results/<gpu>.json`, `<gpu>-checks.json` and `<gpu>.md` (speeds, the ceiling of a gather, every target of
bench/targets.py with its prediction): each result at once, and the rest after every step, so a run that is cut off
keeps what it has. A later run of the same code on the same machine adds to them. Nothing is installed; needs torch,
pytest and pytest-benchmark. Exits with 1 where a step failed; what this machine cannot do is skipped, with the reason.

The last step runs the rivals that it finds and names those that it misses. Besides torch they need the packages triton,
flashinfer-python (with what it depends on, nvcc and ninja) and nvidia-cuda-cccl >= 13.3.5 (and nvcc): where nothing can
be downloaded, carry their wheels or a folder of `pip install --target`, named in PYTHONPATH. flashinfer-python alone,
unpacked, also has CUB's headers for long rows. `python bench/rivals_cuda.py` builds the CUB rivals on another machine:
name what it made in LKV_RIVALS. `--rivals torch` leaves all of them out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # predictions ask the planner in lkv_ext

from report import markdown  # noqa: E402
from results import Run, replace_text, slug  # noqa: E402

SANITIZERS = ("memcheck", "synccheck", "racecheck")
# What compute-sanitizer runs: files, and an expression of `pytest -k`; it slows kernels a hundredfold.
SANITIZED_FILES = ("tests/test_parity.py", "tests/test_cuda.py")
SANITIZED = "(test_evict and not layers) or test_every_size or test_other_budgets"
# memcheck sees accesses out of bounds only where every tensor is an allocation of its own; what captures a graph needs
# torch's cache.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
EVICTIONS = ("bench_evict.py", "bench_gather.py")
OTHERS = sorted({path.name for path in Path(__file__).parent.glob("bench_*.py")} - set(EVICTIONS))
RACES = ("bench_select.py", "bench_evict.py", "bench_layers.py")  # that have rivals besides PyTorch
SMALL = "4096 or 8192"  # of a dry run


@dataclass
class Outcome:
    """What became of one step: passed, failed, skipped or cut off."""

    step: str
    state: str
    seconds: float
    detail: str

    def __str__(self) -> str:
        return f"{self.step:<12} {self.state:<8} {self.seconds:6.0f} s  {self.detail}"


class Report:
    """What became of the steps, in `<slug>-checks.json` and `<slug>.md`: whole at any time."""

    def __init__(self, results: Path, slug: str, gpu: str) -> None:
        self.gpu, self.results = gpu, results
        self.measured, self.checks = results / f"{slug}.json", results / f"{slug}-checks.json"
        # Steps of earlier commands stay.
        known = json.loads(self.checks.read_text())["steps"] if self.checks.exists() else []
        self.outcomes = {each["step"]: Outcome(**each) for each in known}

    def run(self, step: str, do: Callable[[], Outcome]) -> Outcome:
        self.note(Outcome(step, "cut off", 0.0, "did not end"))
        self.note(outcome := do())
        print("\n" + self.summary(), flush=True)
        return outcome

    def note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.step] = outcome
        steps = [asdict(each) for each in self.outcomes.values()]
        checks = {"gpu": self.gpu, "date": time.strftime("%Y-%m-%d"), "steps": steps}
        replace_text(self.checks, json.dumps(checks, indent=1) + "\n")

    def summary(self) -> str:
        lines = [str(outcome) for outcome in self.outcomes.values()]
        if self.measured.exists():
            lines += ["", text := markdown(Run.read(self.measured))]
            replace_text(self.measured.with_suffix(".md"), text + "\n")
        return "\n".join(lines)


@dataclass
class Machine:
    """What the steps share."""

    args: argparse.Namespace
    environment: dict[str, str]

    def run(self, step: str, command: list[str], limit: float, **environment: str) -> Outcome:
        """Runs a command to its end, its output passed on; its last line is the detail of the outcome."""
        print(f"\n== {step}: {' '.join(command)}", flush=True)
        begin, last = time.monotonic(), ""
        command = ["timeout", "--kill-after=10", str(int(limit)), *command]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        with subprocess.Popen(command, cwd=ROOT, env=self.environment | environment, **options) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip().replace(f"{ROOT}/", "") or last
            code = process.wait()
        detail = f"no end within {limit:.0f} s" if code in (124, 137) else last
        return Outcome(step, "passed" if code == 0 else "failed", time.monotonic() - begin, detail)

    def pytest(self, step: str, *arguments: str, limit: float = 0, under: Sequence[str] = (), **env: str) -> Outcome:
        command = [*under, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        return self.run(step, command, limit or self.args.limit, **env)


def skipped(step: str, why: str) -> Outcome:
    return Outcome(step, "skipped", 0.0, why)


def build(machine: Machine) -> Outcome:
    if machine.args.library is not None:
        return skipped("build", f"prebuilt: {machine.args.library}")
    tree = str(machine.args.build_dir)
    # Into the source tree, as an editable install does: the Python beside it is what the other steps import.
    cmake, ninja = program("cmake"), program("ninja")
    if cmake is None or ninja is None:
        return Outcome("build", "failed", 0.0, "no cmake or no ninja here; give a prebuilt --library")
    options = ("LKV_CUDA=ON", "LKV_TORCH=ON", f"Python_EXECUTABLE={sys.executable}", f"CMAKE_INSTALL_PREFIX={ROOT}")
    configure = [cmake, "-S", str(ROOT), "-B", tree, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    begin = time.monotonic()
    for command in ([*configure, *(f"-D{o}" for o in options)], [cmake, "--build", tree], [cmake, "--install", tree]):
        outcome = machine.run("build", command, machine.args.limit)
        if outcome.state != "passed":
            break
    return replace(outcome, seconds=time.monotonic() - begin)


def program(name: str) -> str | None:
    """A build tool: the one installed for this Python first, as in setup.py."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def without_hypothesis() -> list[str]:
    """Options that leave out the tests that need hypothesis, where it is missing."""
    if importlib.util.find_spec("hypothesis") is not None:
        return []
    words = [f"{verb} {module}" for verb in ("import", "from") for module in ("hypothesis", "strategies")]
    files = [path for path in sorted(ROOT.glob("tests/test_*.py")) if any(w in path.read_text() for w in words)]
    print(f"hypothesis is not installed: {', '.join(path.name for path in files) or 'nothing'} left out")
    return [f"--ignore={path}" for path in files]


def tests(machine: Machine) -> Outcome:
    # tests/mutants needs packages of its own, and no GPU.
    workers = min(8, len(os.sched_getaffinity(0)) // 2)
    together = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") is not None else []
    return machine.pytest("tests", "tests", "--ignore=tests/mutants", "-m", "cuda", *together, *without_hypothesis())


def sanitizer(machine: Machine) -> Outcome:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return skipped("sanitizer", "no compute-sanitizer here")
    # Some runtimes refuse the debugger interface: that has nothing to do with the kernels.
    probe = "import torch; torch.ones(1, device='cuda').add_(1); torch.cuda.synchronize(); print('probed')"

    def checked(kind: str) -> list[str]:
        return [tool, "--tool", kind, "--error-exitcode", "9"]

    try:
        command = [*checked("memcheck"), sys.executable, "-c", probe]
        trial = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired as late:
        return skipped("sanitizer", f"compute-sanitizer has not started a program within {late.timeout:.0f} s")
    if trial.returncode != 0 or "probed" not in trial.stdout:
        refusals = (line for line in (trial.stdout + trial.stderr).splitlines() if "=====" in line)
        why = next(refusals, "no reason given").strip("= ")
        return skipped("sanitizer", f"compute-sanitizer is refused here: {why}")

    def check(kind: str) -> Outcome:
        uncached = UNCACHED if kind == "memcheck" else {}
        subset = (
            f"({machine.args.sanitize}) and not graph and not test_other_budgets" if uncached else machine.args.sanitize
        )
        arguments = (*SANITIZED_FILES, "-m", "cuda", "-k", subset, "-x")
        return machine.pytest("sanitizer", *arguments, under=checked(kind), **uncached)

    # Side by side: most of their time is spent on the host.
    with ThreadPoolExecutor() as pool:
        found = dict(zip(machine.args.sanitizers, pool.map(check, machine.args.sanitizers), strict=True))
    state = next((outcome.state for outcome in found.values() if outcome.state != "passed"), "passed")
    detail = "; ".join(f"{kind} {outcome.state}: {outcome.detail.strip('= ')}" for kind, outcome in found.items())
    return Outcome("sanitizer", state, max(outcome.seconds for outcome in found.values()), detail)


def bench(files: Sequence[str], rivals: str) -> Callable[[Machine], Outcome]:
    """A step that runs these files, with PyTorch's compositions ("torch") or with all that is there."""

    def measure(machine: Machine) -> Outcome:
        args = machine.args
        if rivals == "all" and args.rivals != "all":
            return skipped("bench", "--rivals torch")
        options = ["--device", "cuda", "--seconds", str(args.seconds)]
        if args.dry_run:
            options = ["--device", "cpu", "--seconds", "0.01", "-k", SMALL]
        options += ["--results", str(args.results), "--keep", "--rivals", rivals, *args.select]
        paths = [f"bench/{name}" for name in files]
        fixed = ("--benchmark-only", "--benchmark-quiet", "--warm-gigabytes", "0")
        return machine.pytest("bench", *paths, *fixed, *options)

    return measure


class Step(NamedTuple):
    do: Callable[[Machine], Outcome]
    minutes: int  # of an H200 with 16 cores; of the sanitizer and the other ops estimated, as they were cut off
    purpose: str


# The riskiest last: rivals compile, and may leave a process unable to capture.
STEPS = {
    "build": Step(build, 1, "the op library, for the GPU at hand"),
    "tests": Step(tests, 2, "pytest -m cuda"),
    "sanitizer": Step(sanitizer, 9, f"compute-sanitizer: {', '.join(SANITIZERS)}"),
    "bench-evict": Step(bench(EVICTIONS, "torch"), 2, "evict and gather beside PyTorch, and the ceiling of a gather"),
    "bench-others": Step(bench(OTHERS, "torch"), 5, "all other ops beside PyTorch"),
    "bench-rivals": Step(bench(RACES, "all"), 3, "evict and select beside torch.compile, Triton, CUB and FlashInfer"),
}


def plan(names: Sequence[str]) -> str:
    """The steps with what they do and how long they should take."""
    lines = [f"{name:<12} about {STEPS[name].minutes:2} min  {STEPS[name].purpose}" for name in names]
    return "\n".join([*lines, f"{'all':<12} about {sum(STEPS[name].minutes for name in names):2} min"])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--library", type=Path, help="an op library built elsewhere, in place of building one")
    add("--build-dir", type=Path, default=ROOT / "build" / "gpu")
    add("--results", type=Path, help="folder; default: bench/results, of a dry run build/gpu-dry-run")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all of them")
    add("--dry-run", action="store_true", help="on this CPU, a few small cases; no GPU is needed")
    add("--seconds", type=float, default=0.1, help="time per benchmark case")
    add("--limit", type=float, default=540, help="seconds that a command of a step may take")
    add("--sanitize", default=SANITIZED, help="pytest -k expression for compute-sanitizer")
    add("--sanitizers", nargs="+", default=list(SANITIZERS), help="its tools")
    add("--rivals", choices=("torch", "all"), default="all", help="torch: PyTorch compositions alone")
    add("--select", nargs="*", default=[], help="more arguments for the pytest of the benchmarks: --select=-kWORDS")
    args = parser.parse_args(arguments)
    if args.library is not None and not args.library.is_file():
        parser.error(f"--library {args.library}: no such file")
    default = ROOT / "build" / "gpu-dry-run" if args.dry_run else ROOT / "bench" / "results"
    args.results = (args.results or default).resolve()
    return args


def main() -> int:
    import torch

    args = parse()
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device that torch can use: nothing to do here but a --dry-run")
        return 1
    gpu = "none: a dry run" if args.dry_run else torch.cuda.get_device_name()
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if args.library is not None:
        environment["LKV_LIBRARY"] = str(args.library.resolve())
    machine = Machine(args, environment)
    names = [name for name in STEPS if name in args.steps]
    print(plan(names), flush=True)
    report = Report(args.results, slug("cpu" if args.dry_run else "cuda"), gpu)
    failed = False
    for name in names:
        if args.dry_run and not name.startswith("bench"):
            report.note(skipped(name, "a dry run"))
            continue
        outcome = report.run(name, lambda name=name: replace(STEPS[name].do(machine), step=name))
        failed |= outcome.state == "failed"
        if name == "build" and failed:
            break
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
