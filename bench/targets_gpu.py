"""What the project promises of an H200, as data: beside the prediction of bench/model.py, and beside what a run found.

Times are of CUDA graphs with a cold L2 cache; bf16 rows of 128, fp32 scores, B=1, H=8, 15 % kept where nothing else is
said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from cards import GPUS, Gpu
from model import Prediction, Work, predict
from results import Result, Run
from shapes import Shape, name_of

LARGE = 256e6  # bytes moved, from which on a call runs at the ceiling
PYTORCH = ("naive", "best", "best by mask", "best batched", "best out=", "torch.compile", "loop")
STOCK = (*PYTORCH, "flashinfer", "triton")
CUB = ("cub batched, sort, our gather", "cub per row, sort, our gather")
DTYPES = {name_of(dtype): dtype for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn)}


@dataclass(frozen=True)
class Measured:
    value: float
    case: str  # the worst of those that count


@dataclass(frozen=True)
class GpuTarget:
    """A bound on microseconds, from above, or on a ratio, from below.

    Attributes:
        says, bound, unit: "us" or "x".
        measure: from a run's results; None where none of them counts.
        predict: None where there is no model, as of rivals.
    """

    says: str
    bound: float
    unit: str
    measure: Callable[[Run], Measured | None]
    predict: Callable[[Gpu], float | None] = lambda gpu: None

    def verdict(self, value: float) -> str:
        excess = value / self.bound if self.unit == "us" else self.bound / value
        return "met" if excess <= 1 else "missed by less than a tenth" if excess <= 1.1 else "missed"

    def show(self, value: float | None) -> str:
        return "" if value is None else f"{microseconds(value)} us" if self.unit == "us" else f"{value:.2f}x"

    @property
    def limit(self) -> str:
        return f"at most {self.bound:g} us" if self.unit == "us" else f"at least {self.bound:.2g}x"


@dataclass(frozen=True)
class Timed:
    """A target in microseconds: the call, and how the benchmark calls it."""

    says: str
    op: str
    work: Work
    bound: float

    def target(self) -> GpuTarget:
        return GpuTarget(self.says, self.bound, "us", self._measure, lambda gpu: predict(gpu, self.work).total_us)

    def _measure(self, run: Run) -> Measured | None:
        result = run.find(f"{self.op} graph {self.work.shape}")
        return None if result is None or result.us is None else Measured(result.us, result.case)


def _evict(length: int, layers: int, bound: float) -> Timed:
    if layers == 1:
        return Timed(f"evict, L={length}", "evict", Work(Shape(length)), bound)
    return Timed(f"evict_layers, {layers} x L={length}", f"evict_layers {layers}", Work(Shape(length), layers), bound)


TIMED = (
    *(_evict(length, 1, bound) for length, bound in ((8192, 10), (32768, 20), (131072, 55))),
    *(_evict(length, 32, bound) for length, bound in ((4096, 50), (32768, 350), (131072, 1400))),
    Timed("select, 8 rows of L=131072", "select", Work(Shape(131072), op="select"), 15),
)


def work_of(result: Result) -> Work | None:
    """The call that a result of `evict` or `evict_layers` is about."""
    op = re.fullmatch(r"evict(?:_layers (\d+))?", result.op)
    shape = re.fullmatch(
        r"\[(\d+), (\d+), (\d+), (\d+)\] (\w+)(?: (\w+) scores)? [\d.e-]+%( skewed)?( .*)?", result.shape
    )
    if op is None or shape is None or shape[5] not in DTYPES:
        return None
    batch, heads, length, dim = map(int, shape.groups()[:4])
    scores = DTYPES.get(shape[6] or "", torch.float32)
    made = Shape(length, heads, batch, dim, result.retention, DTYPES[shape[5]], scores, skewed=shape[7] is not None)
    return Work(made, int(op[1] or 1))


def _evictions(run: Run) -> Iterator[tuple[Result, Work]]:
    for result in run.results:
        work = work_of(result)
        if work is not None and result.us:
            yield result, work


def _worst(found: Iterable[Measured]) -> Measured | None:
    return min(found, key=lambda measured: measured.value, default=None)


def _ceiling(run: Run, retention: float) -> float | None:
    """GB/s of a gather of random rows that are about as dense."""
    found = [r for r in run.results if r.op == "ceiling random" and r.mode == "graph" and r.gbps]
    return min(found, key=lambda r: abs(r.retention - retention)).gbps if found else None


def _share_of_ceiling(run: Run) -> Measured | None:
    found = []
    for result, work in _evictions(run):
        ceiling = _ceiling(run, work.shape.retention)
        if ceiling is not None and work.moved_bytes > LARGE and result.mode == "graph" and work.shape.row_bytes == 256:
            found.append(Measured(work.moved_bytes / result.us / 1e3 / ceiling, result.case))
    return _worst(found)


def _predicted_share(gpu: Gpu) -> float:
    large = [timed.work for timed in TIMED if timed.work.moved_bytes > LARGE]
    ceiling = gpu.copy_rate * gpu.row_share * 1e3
    return min(work.moved_bytes / ceiling / predict(gpu, work).total_us for work in large)


def _skewed(length: int) -> GpuTarget:
    """One head with 40 % of the budget."""
    shape = Shape(length, skewed=True)

    def measure(run: Run) -> Measured | None:
        result = run.find(f"evict graph {shape}")
        return None if result is None or "uniform" not in result.ratios else Measured(result.ratios["uniform"], "")

    def predicted(gpu: Gpu) -> float:
        return predict(gpu, Work(Shape(length))).total_us / predict(gpu, Work(shape)).total_us

    return GpuTarget(f"skewed budgets, L={length}: speed of uniform ones", 1 / 1.1, "x", measure, predicted)


def _over(names: tuple[str, ...], counts: Callable[[Work], bool]) -> Callable[[Run], Measured | None]:
    """The least speed over rivals at any shape that counts."""

    def measure(run: Run) -> Measured | None:
        return _worst(
            Measured(result.ratios[name], f"{name}, {result.case}")
            for result, work in _evictions(run)
            for name in names
            if name in result.ratios and counts(work)
        )

    return measure


def _overhead_counts(above: bool, work: Work) -> bool:
    """Whether select and launches are over a third of the modelled time of an H200."""
    found = predict(GPUS["h200"], work)
    return ((found.launch_us + found.select_us) / found.total_us > 1 / 3) == above


TARGETS = (
    *(timed.target() for timed in TIMED),
    GpuTarget("evictions over 256 MB: share of the gather's ceiling", 0.9, "x", _share_of_ceiling, _predicted_share),
    _skewed(8192),
    _skewed(131072),
    GpuTarget("any eviction: speed over rivals with stock gathers", 1.3, "x", _over(STOCK, lambda work: True)),
    GpuTarget("ragged budgets: speed over PyTorch", 5, "x", _over(PYTORCH, lambda work: work.shape.skewed)),
    GpuTarget(
        "select and launches over a third: speed over CUB and our gather",
        1.3,
        "x",
        _over(CUB, partial(_overhead_counts, True)),
    ),
    GpuTarget("elsewhere: speed over CUB and our gather", 1, "x", _over(CUB, partial(_overhead_counts, False))),
)


def works() -> dict[str, Work]:
    """The calls that have a prediction."""
    skewed = {f"evict, L={length}, skewed": Work(Shape(length, skewed=True)) for length in (8192, 131072)}
    return {**{timed.says: timed.work for timed in TIMED}, **skewed}


def gpu_of(name: str) -> Gpu | None:
    """What is known of a card that torch calls `name`."""
    return next((gpu for short, gpu in GPUS.items() if short.upper() in name), None)


def predictions(gpu: Gpu) -> str:
    """Markdown: what the model says of every target."""
    lines = [
        f"Predictions for one {gpu.name}, not measurements. Bounds are of an H200.",
        "",
        "| target | bound | predicted | rows at 95 to 80 % | floor | launches, select, gather | how | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    of = {timed.says: timed for timed in TIMED}
    for target in TARGETS:
        value = target.predict(gpu)
        if value is None:
            lines.append(f"| {target.says} | {target.limit} | no model | | | | | |")
            continue
        low, high = (target.predict(replace(gpu, row_share=share)) for share in (0.95, 0.8))
        between = f"{microseconds(low)} to {microseconds(high)} us" if target.unit == "us" else ""
        made = predict(gpu, of[target.says].work) if target.says in of else None
        cells = [target.says, target.limit, target.show(value), between, *_parts(made), target.verdict(value)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parts(made: Prediction | None) -> tuple[str, str, str]:
    if made is None:
        return "", "", ""
    plan = made.plan
    clusters = f"{plan.clusters} x {plan.cluster} blocks"
    waves = f", {plan.waves} waves" if plan.waves > 1 else ""
    how = f"{plan.launches} launches, {clusters}{waves}, keys in {plan.keys_in}"
    parts = ", ".join(map(microseconds, (made.launch_us, made.select_us, made.gather_us)))
    return f"{microseconds(made.floor_us)} us", parts, how


def microseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(run: Run) -> str:
    """Markdown: every target, predicted and measured."""
    name = str(run.machine.get("gpu", ""))
    gpu = gpu_of(name)
    lines = [
        f"Targets are of an H200; this is one {name}. Predictions are of bench/model.py.",
        "",
        "| target | bound | predicted | measured | | |",
        "|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        measured = target.measure(run)
        predicted = "" if gpu is None else target.show(target.predict(gpu))
        found = ("", "not measured", "")
        if measured is not None:
            found = (target.show(measured.value), target.verdict(measured.value), measured.case)
        lines.append(f"| {' | '.join((target.says, target.limit, predicted, *found))} |")
    return "\n".join(lines)


def ceilings(run: Run) -> str:
    """Markdown: how fast a gather alone moves rows, by how they lie."""
    lines = ["| rows of a gather | | GB/s | of memcpy | by bulk copies |", "|---|---|---|---|---|"]
    for result in run.results:
        if result.op.startswith("ceiling ") and result.gbps:
            ratios = {name: f"{result.ratios[name]:.2f}x" if name in result.ratios else "" for name in ("bulk copies",)}
            memcpy = f"{100 * result.ratios['memcpy']:.0f} %" if "memcpy" in result.ratios else ""
            cells = (result.op.removeprefix("ceiling "), result.shape, f"{result.gbps:.0f}", memcpy, *ratios.values())
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""
