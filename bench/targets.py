"""What the project promises of its speed and memory, as data, and whether a run keeps it.

For the CPU path: ratios within one run, on any instruction set, with budgets in an int32 tensor on the host and 2
threads. For an H200: CUDA graphs with a cold L2 cache, beside the prediction of bench/prediction.py. Shapes are bf16,
D=128, B=1, H=8, 15 % kept, fp32 scores unless stated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from prediction import GPUS, H200, Gpu, Work, has_planner, predict
from results import Result, Run
from shapes import DTYPES, Shape

LINEAR = SKEW = 1 / 1.15
LARGE = 256e6  # bytes moved, from which on a call runs at the ceiling
BEST = ("best", "best by mask")  # which of them is faster depends on the shape
PYTORCH = ("naive", *BEST, "best batched", "best out=", "torch.compile", "loop")
STOCK = (*PYTORCH, "flashinfer", "triton")
CUB = ("cub batched, sort, our gather", "cub per row, sort, our gather")


@dataclass(frozen=True)
class Measured:
    value: float
    case: str  # the worst of those that count


Measure = Callable[[Run], Measured | None]


@dataclass(frozen=True)
class Target:
    """A bound: on a ratio to a rival ("x") from below, on microseconds or a share of memory ("us", "%") from above.

    Attributes:
        name, bound, unit: a share is a fraction here.
        measure: from a run's results; None where none of them counts.
        work: the call that the time is of, where there is a model of it.
        predict: by the model; None where there is none, such as for rivals.
        vectors: the rival computes on vectors of the machine, so there is no promise for the portable kernels.
        short: heads a column of the README's table of instruction sets.
    """

    name: str
    bound: float
    measure: Measure
    unit: str = "x"
    work: Work | None = None
    predict: Callable[[Gpu], float | None] = lambda gpu: None
    vectors: bool = False
    short: str = ""

    def promised(self, run: Run) -> bool:
        return not (self.vectors and run.machine.get("cpu_isa") == "portable")

    def verdict(self, value: float) -> str:
        excess = self.bound / value if self.unit == "x" else value / self.bound
        return "met" if excess <= 1 else "missed by less than a tenth" if excess <= 1.1 else "missed"

    def show(self, value: float | None) -> str:
        if value is None:
            return ""
        return {"x": f"{value:.2f}x", "%": f"{100 * value:.2f} %", "us": f"{microseconds(value)} us"}[self.unit]

    @property
    def limit(self) -> str:
        bound = self.bound
        return {"x": f"at least {bound:.2g}x", "%": f"at most {100 * bound:.0f} %", "us": f"at most {bound:g} us"}[
            self.unit
        ]


def microseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def ratio(name: str, bound: float, case: str, *rivals: str, vectors: bool = False, short: str = "") -> Target:
    """Speed over the fastest of these rivals that the case has."""

    def measure(run: Run) -> Measured | None:
        result = run.find(case)
        return _worst(Measured(result.ratios[r], case) for r in rivals if r in result.ratios) if result else None

    return Target(name, bound, measure, vectors=vectors, short=short)


def share(name: str, bound: float, case: str) -> Target:
    """Peak memory over the bytes of the input cache."""

    def measure(run: Run) -> Measured | None:
        result = run.find(case)
        return None if result is None or result.share is None else Measured(result.share, case)

    return Target(name, bound, measure, "%")


def _evict(mode: str, length: int, skewed: bool = False) -> str:
    return f"evict {mode} {Shape(length, skewed=skewed)}"


def _soft_topk(rows: int, length: int) -> Iterator[Target]:
    for mode, what in (("fwd", "forward"), ("both", "forward and backward")):
        short = f"`soft_topk` [{rows}, {length}] {what}" if (rows, length) == (32, 4096) else ""
        name, case = f"soft_topk, [{rows}, {length}]: {what}", f"soft_topk {mode} [{rows}, {length}] fp32 15% T=0.1"
        yield ratio(f"{name}, speed over the best composition", 4, case, "best", vectors=True, short=short)


FRESH, WARM, SELECT = _evict("fresh", 131072), _evict("warm", 131072), f"select fresh {Shape(131072)}"
SKEWED = f"attend warm {Shape(32768, skewed=True)}"
ATTEND, COMPOSED = "attend, 32768 tokens, skewed", "speed over the best composition"
GENERATE, PROMPT = "generate, 16k prompt", Shape(16384, dim=64, dtype=torch.float32)

CPU_TARGETS = (
    ratio("evict, L=131072, fresh: speed over the naive pipeline", 10, FRESH, "naive"),
    ratio(f"evict, L=131072, fresh: {COMPOSED}", 1.8, FRESH, *BEST, short="`evict` 131072 over best"),
    ratio("evict, L=131072, fresh: speed of clone", 0.9, FRESH, "memcpy", short="over clone"),
    ratio(f"evict, L=131072, warm: {COMPOSED}", 2.2, WARM, "best out="),
    ratio("evict, L=131072, warm: speed of memcpy", 0.4, WARM, "memcpy"),
    ratio(f"evict, L=8192: {COMPOSED}", 3, _evict("fresh", 8192), *BEST, short="`evict` 8192 over best"),
    ratio("select, L=131072: speed over topk", 10, SELECT, "topk", short="`select` 131072 over topk"),
    ratio("select, L=131072: speed over topk(sorted=False)", 5, SELECT, "topk unsorted"),
    ratio(
        "select, L=8192: speed over topk", 3.5, f"select fresh {Shape(8192)}", "topk", short="`select` 8192 over topk"
    ),
    *(
        ratio(f"skewed budgets, L={length}: speed of uniform ones", SKEW, _evict("fresh", length, True), "uniform")
        for length in (131072, 8192)
    ),
    *(
        ratio(f"ragged budgets, L={length}: speed over the per-head loop", 5, _evict("fresh", length, True), "loop")
        for length in (131072, 8192)
    ),
    ratio(
        "[1, 2, 16, 8]: speed over the naive pipeline",
        1.5,
        f"evict fresh {Shape(16, heads=2, dim=8, retention=0.5)}",
        "naive",
        short="`evict` [1, 2, 16, 8] over naive",
    ),
    ratio(
        f"{ATTEND}: speed over SDPA on the dense cache",
        5,
        SKEWED,
        "dense",
        vectors=True,
        short="`attend` over dense SDPA",
    ),
    ratio(f"{ATTEND}: speed over SDPA on the padded cache", 2, SKEWED, "padded", vectors=True),
    ratio(f"{ATTEND}: read rate over that of memcpy", 0.6, SKEWED, "memcpy", vectors=True),
    ratio(
        "append of a token at 100k kept rows: speed of a bare write of its rows",
        1 / 3,
        f"append warm {Shape(12500, retention=1.0)}",
        "bare write",
    ),
    ratio(
        f"{GENERATE}: speed of a decoding step over the dense cache", 2.5, f"generate 8 step {PROMPT}", "dense cache"
    ),
    # One of eight layers in full, and the rows kept of all.
    share(f"{GENERATE}: peak of the cache over the dense one", 1 / 8 + 0.15, f"generate 8 peak {PROMPT}"),
    *(target for sizes in ((32, 4096), (32, 32768), (8, 131072)) for target in _soft_topk(*sizes)),
    share("evict: scratch over the input cache", 0.02, f"evict scratch {Shape(131072)}"),
    share("evict_: scratch over the input cache", 0.02, f"evict_ scratch {Shape(131072)}"),
    ratio("linear in L: speed of four calls at L/4", LINEAR, f"evict scaling warm {Shape(131072)}", "4 x L/4"),
    ratio(
        "linear in kept rows: speed of four calls at a quarter of the budget",
        LINEAR,
        f"evict scaling warm {Shape(32768, retention=0.6)}",
        "4 x 15%",
    ),
)


def timed(name: str, bound: float, op: str, work: Work) -> Target:
    """Microseconds of one call in a graph."""

    def measure(run: Run) -> Measured | None:
        result = run.find(f"{op} graph {work.shape}")
        return None if result is None or result.us is None else Measured(result.us, result.case)

    return Target(name, bound, measure, "us", work, lambda gpu: predict(gpu, work).total_us)


def _skewed(length: int) -> Target:
    """One head with 40 % of the budget."""
    shape = Shape(length, skewed=True)
    found = ratio(f"skewed budgets, L={length}: speed of uniform ones", 1 / 1.1, f"evict graph {shape}", "uniform")

    def predicted(gpu: Gpu) -> float:
        return predict(gpu, Work(Shape(length))).total_us / predict(gpu, Work(shape)).total_us

    return Target(found.name, found.bound, found.measure, predict=predicted)


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


def _share_of_ceiling(run: Run) -> Measured | None:
    """The rate over that of a gather of random rows that are about as dense."""
    ceilings = [r for r in run.results if r.op == "ceiling random" and r.mode == "graph" and r.gbps]
    found = []
    for result, work in _evictions(run):
        if ceilings and work.moved_bytes > LARGE and result.mode == "graph" and work.shape.row_bytes == 256:
            ceiling = min(ceilings, key=lambda r: abs(r.retention - work.shape.retention))
            found.append(Measured(work.moved_bytes / result.us / 1e3 / ceiling.gbps, result.case))
    return _worst(found)


def _predicted_share(gpu: Gpu) -> float:
    large = [target.work for target in TIMED if target.work.moved_bytes > LARGE]
    return min(work.moved_bytes / gpu.row_rate / predict(gpu, work).total_us for work in large)


def _over(names: tuple[str, ...], counts: Callable[[Work], bool]) -> Measure:
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
    if not has_planner():
        return False
    found = predict(H200, work)
    return ((found.launch_us + found.select_us) / found.total_us > 1 / 3) == above


TIMED = (
    *(timed(f"evict, L={n}", us, "evict", Work(Shape(n))) for n, us in ((8192, 10), (32768, 20), (131072, 55))),
    *(
        timed(f"evict_layers, 32 x L={n}", us, "evict_layers 32", Work(Shape(n), 32))
        for n, us in ((4096, 50), (32768, 350), (131072, 1400))
    ),
    timed("select, 8 rows of L=131072", 15, "select", Work(Shape(131072), op="select")),
)
GPU_TARGETS = (
    *TIMED,
    Target("evictions over 256 MB: share of the gather's ceiling", 0.9, _share_of_ceiling, predict=_predicted_share),
    _skewed(8192),
    _skewed(131072),
    Target("any eviction: speed over rivals with stock gathers", 1.3, _over(STOCK, lambda work: True)),
    Target("ragged budgets: speed over PyTorch", 5, _over(PYTORCH, lambda work: work.shape.skewed)),
    Target(
        "select and launches over a third: speed over CUB and our gather",
        1.3,
        _over(CUB, partial(_overhead_counts, True)),
    ),
    Target("elsewhere: speed over CUB and our gather", 1, _over(CUB, partial(_overhead_counts, False))),
)


def table(run: Run) -> str:
    """Markdown: every target, what was measured, met or missed; on a GPU beside the prediction."""
    cuda, name = run.device == "cuda", str(run.machine.get("gpu", ""))
    gpu = next((gpu for short, gpu in GPUS.items() if short.upper() in name and has_planner()), None)
    head = [f"Targets are of an H200; this is one {name}. Predictions are of bench/model.py.", ""] if cuda else []
    titles = ("target", "bound", *("predicted",) * cuda, "measured", "", *("",) * cuda)
    lines = [*head, f"| {' | '.join(titles)} |".replace("|  |", "| |"), "|---" * len(titles) + "|"]
    for target in GPU_TARGETS if cuda else CPU_TARGETS:
        found = target.measure(run)
        verdict = "not measured" if found is None else target.verdict(found.value)
        cells = [target.name, target.limit, target.show(found and found.value)]
        cells.append(verdict if target.promised(run) else "no promise")
        if cuda:
            cells.insert(2, target.show(gpu and target.predict(gpu)))
            cells.append(found.case if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sets_table(runs: list[Run]) -> str:
    """Markdown: a row for each instruction set, where it was measured, and the targets that have a short name."""
    named = [target for target in CPU_TARGETS if target.short]
    lines = [f"| | measured on | {' | '.join(target.short for target in named)} |", "|---" * (2 + len(named)) + "|"]
    for run in runs:
        cells = []
        for target in named:
            found = target.measure(run)
            missed = found is not None and target.promised(run) and target.verdict(found.value) != "met"
            cells.append(target.show(found and found.value) + " (missed)" * missed)
        where = f"{run.machine['cpu']}, {run.machine['threads']} threads, {str(run.machine['date']).split()[0]}"
        lines.append(f"| {run.machine['cpu_isa']} | {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ceilings(run: Run) -> str:
    """Markdown: how fast a gather alone moves rows, by how they lie."""
    lines = ["| rows of a gather | | GB/s | of memcpy | by bulk copies |", "|---|---|---|---|---|"]
    for r in run.results:
        if r.op.startswith("ceiling ") and r.gbps:
            bulk = f"{r.ratios['bulk copies']:.2f}x" if "bulk copies" in r.ratios else ""
            memcpy = f"{100 * r.ratios['memcpy']:.0f} %" if "memcpy" in r.ratios else ""
            lines.append(f"| {r.op.removeprefix('ceiling ')} | {r.shape} | {r.gbps:.0f} | {memcpy} | {bulk} |")
    return "\n".join(lines) if len(lines) > 2 else ""
