"""One result per shape: as a line to read and as JSON to keep."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch


@dataclass
class Result:
    """What one case showed.

    Attributes:
        op, mode, shape: the case. Modes on the CPU: "fresh", the call allocates its result, "warm", it writes into
            memory that is there already, and "cold", fresh and with overwritten caches; on CUDA "cold", call by call
            with a cold L2 cache, and as CUDA graphs "graph", L2 cache cold, and "warm". "" where there is no such
            distinction.
        us: microseconds per call, median over the rounds.
        gbps: bytes that the op must read and write, per second. None where none are counted.
        ratios: the time of every rival over the time of the call, median of the per-round ratios.
        rival_us: their microseconds.
        rounds: how many there were.
        length, retention: for plots.
        share: of cases that measure memory instead of time, the peak over the bytes of the input cache.
        note: what else a reader should know.
    """

    op: str
    mode: str
    shape: str
    us: float | None = None
    gbps: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    rival_us: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    length: int = 0
    retention: float = 0.0
    share: float | None = None
    note: str = ""

    @property
    def case(self) -> str:
        return " ".join(filter(None, (self.op, self.mode, self.shape)))

    def line(self) -> str:
        head = f"{self.op:<13} {self.mode:<5} {self.shape:<42}"
        if self.share is not None:
            line = f"{head} {100 * self.share:9.2f} % of the input cache"
        else:
            speed = "" if self.gbps is None else f"{self.gbps:7.1f} GB/s"
            memcpy = f"{100 * self.ratios['memcpy']:5.0f} % of memcpy" if "memcpy" in self.ratios else ""
            others = "  ".join(f"{ratio:.2f}x {name}" for name, ratio in self.ratios.items() if name != "memcpy")
            line = f"{head} {self.us:9.1f} us {speed:>12} {memcpy:>17}  {others}".rstrip()
        return f"{line}  {self.note}" if self.note else line


@dataclass
class Run:
    """All results of one device, and where they come from."""

    device: str
    machine: dict[str, object]
    results: list[Result]

    def write(self, path: Path) -> None:
        results = ",\n  ".join(json.dumps(_rounded(asdict(result))) for result in self.results)
        head = {"device": self.device, "machine": self.machine}
        replace_text(path, f'{json.dumps(head, indent=1)[:-2]},\n "results": [\n  {results}\n ]\n}}\n')

    @staticmethod
    def read(path: Path) -> Run:
        data = json.loads(path.read_text())
        return Run(data["device"], data["machine"], [Result(**result) for result in data["results"]])

    def add(self, result: Result) -> None:
        """In place of an older result of that case."""
        cases = [old.case for old in self.results]
        at = cases.index(result.case) if result.case in cases else len(cases)
        self.results[at : at + 1] = [result]

    def goes_on_with(self, earlier: Run) -> bool:
        """Whether both measured the same code on the same machine."""
        names = ("gpu", "cpu", "driver", "torch", "commit", "version")
        return self.device == earlier.device and all(self.machine.get(n) == earlier.machine.get(n) for n in names)

    def find(self, case: str) -> Result | None:
        return next((result for result in self.results if result.case == case), None)


def replace_text(path: Path, text: str) -> None:
    """The file is whole at any time, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def merge(runs: list[Run]) -> Run:
    """The median of every number over several processes on one machine, of those that have the case."""
    if len(runs) == 1:
        return runs[0]
    if len({run.device for run in runs}) != 1:
        raise ValueError(f"expected runs of one device, got {sorted({run.device for run in runs})}")
    cases: dict[str, list[Result]] = {}
    for run in runs:
        for result in run.results:
            cases.setdefault(result.case, []).append(result)
    machine = {**runs[-1].machine, "processes": len(runs)}
    return Run(runs[0].device, machine, [_median(same) for same in cases.values()])


def _median(same: list[Result]) -> Result:
    merged = {**asdict(same[0]), "rounds": sum(result.rounds for result in same)}
    for name in ("us", "gbps", "share"):
        values = [getattr(result, name) for result in same]
        merged[name] = None if None in values else median(values)
    for name in ("ratios", "rival_us"):
        found = [getattr(result, name) for result in same]
        rivals = dict.fromkeys(rival for each in found for rival in each)
        merged[name] = {rival: median(each[rival] for each in found if rival in each) for rival in rivals}
    return Result(**merged)


def slug(device: str) -> str:
    """The name of the files of its results."""
    if device == "cuda":
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{machine(device).get('cpu_isa', 'unknown')}"


def machine(device: str) -> dict[str, object]:
    """What a reader must know to judge the numbers."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.+)", info.read_text() if info.exists() else "", re.MULTILINE)
    found: dict[str, object] = {
        "cpu": cpu[1] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": round(os.getloadavg()[0], 1),
        "commit": _commit(),
    }
    if device == "cuda":
        found |= _gpu()
    try:
        from lkv_ext import build_info

        info = build_info()
        found |= {name: info[name] for name in ("version", "cpu_isa", "cxx_compiler", "cuda_archs")}
    except ImportError:  # a prebuilt op library stands alone
        pass
    return found


def _gpu() -> dict[str, object]:
    """The card, and what drives it."""
    card = torch.cuda.get_device_properties(0)
    # By its UUID: nvidia-smi counts cards that CUDA_VISIBLE_DEVICES hides.
    smi = ("nvidia-smi", f"--id=GPU-{card.uuid}", "--format=csv,noheader")
    return {
        "gpu": card.name,
        "multiprocessors": card.multi_processor_count,
        "memory_gb": round(card.total_memory / 2**30, 1),
        "l2_mb": card.L2_cache_size >> 20,
        "driver": _words(*smi, "--query-gpu=driver_version"),
        "clocks": _words(*smi, "--query-gpu=clocks.max.sm,clocks.max.memory,power.limit"),
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """What is measured; LKV_COMMIT says so of a copy without the history."""
    if given := os.environ.get("LKV_COMMIT"):
        return given
    here = ("git", "-C", str(Path(__file__).parent))
    commit = _words(*here, "rev-parse", "HEAD")
    changed = commit is not None and _words(*here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} and changes" if changed else commit


def _words(*command: str) -> str | None:
    """What a command prints; None where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
