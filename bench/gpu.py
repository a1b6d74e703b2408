"""A whole run on a GPU: build, GPU tests, compute-sanitizer, benchmarks, table, in steps of at most ten minutes each.

    python bench/gpu.py                                     builds for the GPU at hand and does everything
    python bench/gpu.py --library path/to/_torch.so         with an op library built elsewhere; needs no compiler
    python bench/gpu.py --steps tests sanitizer             parts of it, where a command may only take so long
    python bench/gpu.py --dry-run                           no GPU: the same on a few small cases of this CPU

Writes `bench/results/<gpu>.json`, `<gpu>-checks.json` and `<gpu>.md` (speeds, the ceiling of a gather, every target of
bench/targets_gpu.py with its prediction): each result at once, and the rest after every step, so a run that is cut off
keeps what it has. A later run of the same code on the same machine adds to them. Nothing is installed; needs torch,
pytest and pytest-benchmark. Exits with 1 where a step failed; what this machine cannot do is skipped and says why.

The last step runs the rivals that it finds and names those that it misses. Besides torch they need the packages triton,
flashinfer-python (with what it depends on, nvcc and ninja) and nvidia-cuda-cccl >= 13.3.5 (and nvcc): where nothing can
be downloaded, carry their wheels or a folder of `pip install --target`, named in PYTHONPATH. flashinfer-python alone,
unpacked, also has CUB's headers for long rows. `python bench/rivals_cuda.py` builds the CUB rivals on another machine:
name what it made in LKV_RIVALS. `--rivals torch` leaves all of them out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from checks import Outcome, Report

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "synccheck", "racecheck")
# What compute-sanitizer runs, as an expression of `pytest -k`; it slows kernels a hundredfold.
SANITIZED = "(parity and not test_scores) or test_every_size"
# memcheck sees accesses out of bounds only where every tensor is an allocation of its own; graphs need torch's cache.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
EVICTIONS = ("bench_ceiling.py", "bench_evict.py", "bench_gather.py", "bench_in_place.py", "bench_one_launch.py")
RACES = (
    "bench_select.py",
    "bench_evict.py",
    "bench_layers.py",
    "bench_in_place.py",
)  # that have rivals besides PyTorch
SMALL = "4096 or 8192"  # of a dry run


@dataclass
class Machine:
    """What the steps share."""

    args: argparse.Namespace
    environment: dict[str, str]

    def run(self, step: str, command: list[str], limit: float, **environment: str) -> Outcome:
        """Runs a command to its end, its output passed on; the last line says how it went."""
        print(f"\n== {step}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        last, code = "", -1
        with subprocess.Popen(
            ["timeout", "--kill-after=10", str(int(limit)), *command],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
            code = process.wait()
        says = f"no end within {limit:.0f} s" if code in (124, 137) else last
        return Outcome(step, "passed" if code == 0 else "failed", time.monotonic() - begin, says)

    def pytest(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def slug_of(gpu: str, dry_run: bool) -> str:
    """The name of the files of results, as bench/conftest.py makes it."""
    if not dry_run:
        return gpu.lower().replace(" ", "-")
    import lkv_ext

    return f"cpu-{lkv_ext.build_info()['cpu_isa']}"


def skipped(step: str, why: str) -> Outcome:
    return Outcome(step, "skipped", 0.0, why)


def build(machine: Machine) -> Outcome:
    if machine.args.library is not None:
        return skipped("build", f"prebuilt: {machine.args.library}")
    tree = machine.args.build_dir
    # Into the source tree, as an editable install does: the Python beside it is what the other steps import.
    cmake, ninja = program("cmake"), program("ninja")
    if cmake is None or ninja is None:
        return Outcome("build", "failed", 0.0, "no cmake or no ninja here; give a prebuilt --library")
    configure = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DLKV_CUDA=ON", "-DLKV_TORCH=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_INSTALL_PREFIX={ROOT}"]
    for command in (configure, [cmake, "--build", str(tree)], [cmake, "--install", str(tree)]):
        outcome = machine.run("build", command, machine.args.limit)
        if outcome.state != "passed":
            return outcome
    return outcome


def program(name: str) -> str | None:
    """A build tool: the one installed for this Python first, as in setup.py."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def without_hypothesis() -> list[str]:
    """Options that leave out the tests that need hypothesis, where it is missing."""
    if importlib.util.find_spec("hypothesis") is not None:
        return []
    files = [path for path in sorted(ROOT.glob("tests/test_*.py")) if needs_hypothesis(path)]
    print(f"hypothesis is not installed: {', '.join(path.name for path in files) or 'nothing'} left out")
    return [f"--ignore={path}" for path in files]


def needs_hypothesis(path: Path) -> bool:
    text = path.read_text()
    return any(
        word in text for word in ("import hypothesis", "from hypothesis", "from strategies", "import strategies")
    )


def tests(machine: Machine) -> Outcome:
    return machine.run("tests", machine.pytest("tests", "-m", "cuda", *without_hypothesis()), machine.args.limit)


def sanitizer(machine: Machine) -> Outcome:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return skipped("sanitizer", "no compute-sanitizer here")
    # Some runtimes refuse the debugger interface: that says nothing about the kernels.
    probe = "import torch; torch.ones(1, device='cuda').add_(1); torch.cuda.synchronize(); print('probed')"
    checked = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    try:
        trial = subprocess.run([*checked, sys.executable, "-c", probe], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired as late:
        return skipped("sanitizer", f"compute-sanitizer has not started a program within {late.timeout:.0f} s")
    if trial.returncode != 0 or "probed" not in trial.stdout:
        refusal = next(
            (line for line in (trial.stdout + trial.stderr).splitlines() if "=====" in line), "no reason given"
        )
        return skipped("sanitizer", f"compute-sanitizer is refused here: {refusal.strip('= ')}")
    found = {}
    each = machine.args.limit / len(machine.args.sanitizers)
    for kind in machine.args.sanitizers:
        uncached = UNCACHED if kind == "memcheck" else {}
        subset = f"({machine.args.sanitize}) and not graph" if uncached else machine.args.sanitize
        tests = machine.pytest("tests", "-m", "cuda", "-k", subset, "-x", *without_hypothesis())
        command = [tool, "--tool", kind, "--error-exitcode", "9", *tests]
        found[kind] = machine.run("sanitizer", command, each, **uncached)
    state = next((outcome.state for outcome in found.values() if outcome.state != "passed"), "passed")
    says = "; ".join(f"{kind} {outcome.state}: {outcome.says.strip('= ')}" for kind, outcome in found.items())
    return Outcome("sanitizer", state, sum(outcome.seconds for outcome in found.values()), says)


def bench(machine: Machine, step: str, files: Sequence[str], rivals: str) -> Outcome:
    if rivals == "all" and machine.args.rivals != "all":
        return skipped(step, "--rivals torch")
    options = ["--device", "cuda", "--seconds", str(machine.args.seconds)]
    if machine.args.dry_run:
        options = ["--device", "cpu", "--seconds", "0.01", "-k", SMALL]
    options += ["--results", str(machine.args.results), "--keep", "--rivals", rivals, *machine.args.select]
    paths = [f"bench/{name}" for name in files]
    command = machine.pytest(*paths, "--benchmark-only", "--benchmark-quiet", "--warm-gigabytes", "0", *options)
    return machine.run(step, command, machine.args.limit)


def bench_evict(machine: Machine) -> Outcome:
    return bench(machine, "bench-evict", EVICTIONS, "torch")


def bench_others(machine: Machine) -> Outcome:
    others = sorted(path.name for path in (ROOT / "bench").glob("bench_*.py") if path.name not in EVICTIONS)
    return bench(machine, "bench-others", others, "torch")


def bench_rivals(machine: Machine) -> Outcome:
    return bench(machine, "bench-rivals", RACES, "all")


class Step(NamedTuple):
    do: Callable[[Machine], Outcome]
    minutes: int  # expected of a data centre's GPU with 16 cores: estimated, not measured
    says: str


# The riskiest last: rivals compile, and may leave a process unable to capture.
STEPS = {
    "build": Step(build, 5, "the op library, for the GPU at hand"),
    "tests": Step(tests, 5, "pytest -m cuda"),
    "sanitizer": Step(sanitizer, 9, f"compute-sanitizer: {', '.join(SANITIZERS)}"),
    "bench-evict": Step(bench_evict, 4, "evict and gather beside PyTorch, and the ceiling of a gather"),
    "bench-others": Step(bench_others, 5, "all other ops beside PyTorch"),
    "bench-rivals": Step(bench_rivals, 9, "evict and select beside torch.compile, Triton, CUB and FlashInfer"),
}


def plan(names: Sequence[str]) -> str:
    """The steps with what they do and how long they should take."""
    lines = [f"{name:<12} about {STEPS[name].minutes:2} min  {STEPS[name].says}" for name in names]
    return "\n".join([*lines, f"{'all':<12} about {sum(STEPS[name].minutes for name in names):2} min"])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="an op library built elsewhere, in place of building one")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--results", type=Path, help="folder; default: bench/results, of a dry run build/gpu-dry-run")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all of them")
    parser.add_argument("--dry-run", action="store_true", help="on this CPU, a few small cases; no GPU is needed")
    parser.add_argument("--seconds", type=float, default=0.5, help="time per benchmark case")
    parser.add_argument("--limit", type=float, default=540, help="seconds that a command of a step may take")
    parser.add_argument("--sanitize", default=SANITIZED, help="pytest -k expression for compute-sanitizer")
    parser.add_argument("--sanitizers", nargs="+", default=list(SANITIZERS), help="its tools")
    parser.add_argument("--rivals", choices=("torch", "all"), default="all", help="torch: PyTorch compositions alone")
    parser.add_argument(
        "--select", nargs="*", default=[], help="more arguments for the pytest of the benchmarks, as --select=-kWORDS"
    )
    args = parser.parse_args(arguments)
    if args.library is not None and not args.library.is_file():
        parser.error(f"--library {args.library}: no such file")
    default = ROOT / "build" / "gpu-dry-run" if args.dry_run else ROOT / "bench" / "results"
    args.results = (args.results or default).resolve()
    return args


def main() -> int:
    args = parse()
    gpu = "none: a dry run" if args.dry_run else gpu_name()
    if gpu is None:
        print("no CUDA device that torch can use: nothing to do here but a --dry-run")
        return 1
    environment = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if args.library is not None:
        environment["LKV_LIBRARY"] = str(args.library.resolve())
    machine = Machine(args, environment)
    names = [name for name in STEPS if name in args.steps]
    print(plan(names), flush=True)
    report = Report(args.results, slug_of(gpu, args.dry_run), gpu)
    failed = False
    for name in names:
        if args.dry_run and not name.startswith("bench"):
            report.note(skipped(name, "a dry run"))
            continue
        outcome = report.run(name, partial(STEPS[name].do, machine))
        failed |= outcome.state == "failed"
        if name == "build" and failed:
            break
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
