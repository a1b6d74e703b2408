"""A whole run on a GPU in one command: build, GPU tests, compute-sanitizer, benchmarks, table.

    python bench/gpu.py                                     builds for the GPU at hand and does everything
    python bench/gpu.py --library path/to/_torch.so         with an op library built elsewhere; needs no compiler
    python bench/gpu.py --steps bench --seconds 0.5         one part of it

Writes `bench/results/<gpu>.json`, `<gpu>-checks.json` and `<gpu>.md` (speeds, the ceiling of a gather, every target of
bench/targets_gpu.py with its prediction). Nothing is installed; needs torch, pytest and pytest-benchmark. Exits with 1
where a step failed; a step that this machine cannot do is skipped and says why.

The benchmark runs the rivals that it finds and names those that it misses. Besides torch they need the packages triton,
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "tests", "sanitizer", "bench")
SANITIZERS = ("memcheck", "synccheck", "racecheck")
# What compute-sanitizer runs, as an expression of `pytest -k`; it slows kernels a hundredfold.
SANITIZED = "(parity and not test_scores) or test_every_size"


@dataclass
class Outcome:
    """What became of one step: passed, failed or skipped."""

    step: str
    state: str
    seconds: float
    says: str

    def __str__(self) -> str:
        return f"{self.step:<10} {self.state:<8} {self.seconds:6.0f} s  {self.says}"


@dataclass
class Machine:
    """What the steps share."""

    args: argparse.Namespace
    environment: dict[str, str]

    def run(self, step: str, command: list[str], limit: float) -> Outcome:
        """Runs a command to its end, its output passed on; the last line says how it went."""
        print(f"\n== {step}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        last, code = "", -1
        with subprocess.Popen(
            ["timeout", "--kill-after=10", str(int(limit)), *command],
            cwd=ROOT,
            env=self.environment,
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


def skipped(step: str, why: str) -> Outcome:
    return Outcome(step, "skipped", 0.0, why)


def build(machine: Machine) -> Outcome:
    if machine.args.library is not None:
        return skipped("build", f"prebuilt: {machine.args.library}")
    tree = machine.args.build_dir
    # Into the source tree, as an editable install does: the Python beside it is what the other steps import.
    configure = ["cmake", "-S", str(ROOT), "-B", str(tree), "-DLKV_CUDA=ON", "-DLKV_TORCH=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={ROOT}"]
    for command in (configure, ["cmake", "--build", str(tree), "-j"], ["cmake", "--install", str(tree)]):
        if shutil.which(command[0]) is None:
            return Outcome("build", "failed", 0.0, "no cmake here; give a prebuilt --library")
        outcome = machine.run("build", command, machine.args.limit)
        if outcome.state != "passed":
            return outcome
    return outcome


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
    trial = subprocess.run([*checked, sys.executable, "-c", probe], capture_output=True, text=True, timeout=180)
    if trial.returncode != 0 or "probed" not in trial.stdout:
        refusal = next(
            (line for line in (trial.stdout + trial.stderr).splitlines() if "=====" in line), "no reason given"
        )
        return skipped("sanitizer", f"compute-sanitizer is refused here: {refusal.strip('= ')}")
    subset = machine.pytest("tests", "-m", "cuda", "-k", machine.args.sanitize, "-x", *without_hypothesis())
    found = {
        kind: machine.run("sanitizer", [tool, "--tool", kind, "--error-exitcode", "9", *subset], machine.args.limit)
        for kind in machine.args.sanitizers
    }
    state = next((outcome.state for outcome in found.values() if outcome.state != "passed"), "passed")
    says = "; ".join(f"{kind} {outcome.state}: {outcome.says.strip('= ')}" for kind, outcome in found.items())
    return Outcome("sanitizer", state, sum(outcome.seconds for outcome in found.values()), says)


def bench(machine: Machine) -> Outcome:
    options = ["--device", "cuda", "--seconds", str(machine.args.seconds), "--results", str(machine.args.results)]
    options += ["--rivals", machine.args.rivals]
    command = machine.pytest(
        "bench", "--benchmark-only", "--benchmark-quiet", "--warm-gigabytes", "0", *machine.args.select, *options
    )
    return machine.run("bench", command, machine.args.limit)


DO: dict[str, Callable[[Machine], Outcome]] = {"build": build, "tests": tests, "sanitizer": sanitizer, "bench": bench}


def write_summary(results: Path, slug: str, gpu: str, outcomes: list[Outcome]) -> str:
    """The checks as JSON, and the table of the benchmarks where there are some."""
    results.mkdir(parents=True, exist_ok=True)
    checks = {"gpu": gpu, "date": time.strftime("%Y-%m-%d"), "steps": [asdict(outcome) for outcome in outcomes]}
    (results / f"{slug}-checks.json").write_text(json.dumps(checks, indent=1) + "\n")
    lines = [str(outcome) for outcome in outcomes]
    measured = results / f"{slug}.json"
    if measured.exists():
        from report import markdown
        from results import Run

        text = markdown(Run.read(measured))
        (results / f"{slug}.md").write_text(text + "\n")
        lines += ["", text]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="an op library built elsewhere, in place of building one")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seconds", type=float, default=1.0, help="time per benchmark case")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that any one command may take")
    parser.add_argument("--sanitize", default=SANITIZED, help="pytest -k expression for compute-sanitizer")
    parser.add_argument("--sanitizers", nargs="+", default=list(SANITIZERS), help="its tools")
    parser.add_argument("--rivals", choices=("torch", "all"), default="all", help="torch: PyTorch compositions alone")
    parser.add_argument("--select", nargs="*", default=[], help="more arguments for the pytest of the benchmarks")
    args = parser.parse_args(arguments)
    if args.library is not None and not args.library.is_file():
        parser.error(f"--library {args.library}: no such file")
    args.results = args.results.resolve()
    return args


def main() -> int:
    args = parse()
    gpu = gpu_name()
    if gpu is None:
        print("no CUDA device that torch can use: nothing to do here")
        return 1
    environment = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if args.library is not None:
        environment["LKV_LIBRARY"] = str(args.library.resolve())
    machine = Machine(args, environment)
    outcomes: list[Outcome] = []
    for step in STEPS:
        if step in args.steps:
            outcomes.append(DO[step](machine))
            if step == "build" and outcomes[-1].state == "failed":
                break
    print("\n" + write_summary(args.results, gpu.lower().replace(" ", "-"), gpu, outcomes))
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
