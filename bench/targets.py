"""What the project promises of its speed and memory, as data, and whether a run keeps it.

For the CPU path: ratios within one run, on any instruction set, with budgets in an int32 tensor on the host and 2
threads. For an H200: CUDA graphs with a cold L2 cache, beside the prediction of bench/prediction.py. Shapes are bf16,
D=128, B=1, H=8, 15 % kept, fp32 scores unless stated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from prediction import H200, Gpu, has_planner, predict
from results import Result, Run
from shapes import Shape

SAME = 1 / 1.15  # of times that should not differ
LARGE = 256e6  # bytes moved, from which on a call runs at the ceiling
BEST = ("best", "best by mask")  # which of them is faster depends on the shape
PYTORCH = ("naive", *BEST, "best batched", "best out=", "torch.compile", "loop")
STOCK = (*PYTORCH, "flashinfer", "triton")
CUB = ("cub batched, sort, our gather", "cub per row, sort, our gather")


@dataclass(frozen=True)
class Measured:
    value: float
    case: str


@dataclass(frozen=True)
class Target:
    """A bound: on a ratio to a rival ("x") from below, on microseconds or a share of memory ("us", "%") from above.

    Attributes:
        name, bound, unit: a share is a fraction here.
        values: all that counts in a run.
        op, shape: the call that a time is of, where there is a model of it.
        predict: by the model; None where there is none, such as for rivals.
        vectors: the rival computes on vectors of the machine, so there is no promise for the portable kernels.
        short: heads a column of the README's table of instruction sets.
    """

    name: str
    bound: float
    values: Callable[[Run], Iterable[Measured]]
    unit: str = "x"
    op: str = ""
    shape: Shape | None = None
    predict: Callable[[Gpu], float | None] = lambda gpu: None
    vectors: bool = False
    short: str = ""

    def measure(self, run: Run) -> Measured | None:
        """The worst of the values; None where a run has none."""
        worst = min if self.unit == "x" else max
        return worst(self.values(run), key=lambda measured: measured.value, default=None)

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
        bound = {"x": f"{self.bound:.2g}x", "%": f"{100 * self.bound:.0f} %", "us": f"{self.bound:g} us"}[self.unit]
        return f"at {'least' if self.unit == 'x' else 'most'} {bound}"


def microseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def ratio(name: str, bound: float, case: str, *rivals: str, **options: object) -> Target:
    """Speed over the fastest of these rivals that the case has."""

    def values(run: Run) -> Iterator[Measured]:
        found = run.find(case)
        return (Measured(found.ratios[rival], case) for rival in rivals if found and rival in found.ratios)

    return Target(name, bound, values, **options)


def share(name: str, bound: float, case: str) -> Target:
    """Peak memory over the bytes of the input cache."""

    def values(run: Run) -> Iterator[Measured]:
        return (Measured(r.share, case) for r in run.results if r.case == case and r.share is not None)

    return Target(name, bound, values, "%")


def timed(name: str, bound: float, op: str, shape: Shape) -> Target:
    """Microseconds of one call in a graph."""
    case = f"{op} {shape.layers} graph {shape}" if shape.layers > 1 else f"{op} graph {shape}"

    def values(run: Run) -> Iterator[Measured]:
        return (Measured(r.us, case) for r in run.results if r.case == case and r.us)

    return Target(name, bound, values, "us", op, shape, lambda gpu: predict(gpu, shape, op).total_us)


def _skewed(mode: str, length: int) -> str:
    """The case of an eviction where one head has 40 % of the budget."""
    return f"evict {mode} {Shape(length, skewed=True)}"


def _soft_topk(rows: int, length: int) -> Iterator[Target]:
    for mode, what in (("fwd", "forward"), ("both", "forward and backward")):
        short = f"`soft_topk` [{rows}, {length}] {what}" if (rows, length) == (32, 4096) else ""
        name, case = f"soft_topk, [{rows}, {length}]: {what}", f"soft_topk {mode} [{rows}, {length}] fp32 15% T=0.1"
        yield ratio(f"{name}, speed over the best composition", 4, case, "best", vectors=True, short=short)


def _in_place(half: Shape) -> Iterator[Target]:
    """Half of the cache kept, by order, end and memory."""
    name, to_the_front = f"half kept, L={half.length}", "evict_ to the front"
    yield ratio(f"{name}, in any order: speed over ascending", 1.6, f"evict_ any front warm {half}", "ascending")
    yield ratio(f"{name}, to the back: speed of {to_the_front}", SAME, f"evict_ back warm {half}", "front")
    for page, bound in ((16, 0.8), (64, 0.9)):
        for tables in ("per head", "shared"):
            case = f"evict_paged_ {page} {tables} warm {half}"
            yield ratio(f"{name}, pages of {page}, tables {tables}: speed of {to_the_front}", bound, case, "in place")


SHORT, LONG, PROMPT = Shape(8192), Shape(131072), Shape(16384, dim=64, dtype=torch.float32)
FRESH, WARM, SELECT = f"evict fresh {LONG}", f"evict warm {LONG}", f"select fresh {LONG}"
TINY = f"evict fresh {Shape(16, heads=2, dim=8, retention=0.5)}"
ATTEND, SKEWED = "attend, 32768 tokens, skewed", f"attend warm {Shape(32768, skewed=True)}"
GENERATE, STEP = "generate, 16k prompt", f"generate 8 step {PROMPT}"
NAIVE, COMPOSED, LOOP = (f"speed over the {rival}" for rival in ("naive pipeline", "best composition", "per-head loop"))
SDPA, UNIFORM = "speed over SDPA on the", "speed of uniform ones"
APPEND = "append of a token at 100k kept rows: speed of a bare write of its rows"
HALF = tuple(Shape(length, retention=0.5) for length in (8192, 32768))
QUARTERS = "linear in kept rows: speed of four calls at a quarter of the budget"

CPU_TARGETS = (
    ratio(f"evict, L=131072, fresh: {NAIVE}", 10, FRESH, "naive"),
    ratio(f"evict, L=131072, fresh: {COMPOSED}", 1.8, FRESH, *BEST, short="`evict` 131072 over best"),
    ratio("evict, L=131072, fresh: speed of clone", 0.9, FRESH, "memcpy", short="over clone"),
    ratio(f"evict, L=131072, warm: {COMPOSED}", 2.2, WARM, "best out="),
    ratio("evict, L=131072, warm: speed of memcpy", 0.4, WARM, "memcpy"),
    ratio(f"evict, L=8192: {COMPOSED}", 3, f"evict fresh {SHORT}", *BEST, short="`evict` 8192 over best"),
    ratio("select, L=131072: speed over topk", 10, SELECT, "topk", short="`select` 131072 over topk"),
    ratio("select, L=131072: speed over topk(sorted=False)", 5, SELECT, "topk unsorted"),
    ratio("select, L=8192: speed over topk", 3.5, f"select fresh {SHORT}", "topk", short="`select` 8192 over topk"),
    *(ratio(f"skewed budgets, L={n}: {UNIFORM}", SAME, _skewed("fresh", n), "uniform") for n in (131072, 8192)),
    *(ratio(f"ragged budgets, L={n}: {LOOP}", 5, _skewed("fresh", n), "loop") for n in (131072, 8192)),
    ratio(f"[1, 2, 16, 8]: {NAIVE}", 1.5, TINY, "naive", short="`evict` [1, 2, 16, 8] over naive"),
    ratio(f"{ATTEND}: {SDPA} dense cache", 5, SKEWED, "dense", vectors=True, short="`attend` over dense SDPA"),
    ratio(f"{ATTEND}: {SDPA} padded cache", 2, SKEWED, "padded", vectors=True),
    ratio(f"{ATTEND}: read rate over that of memcpy", 0.6, SKEWED, "memcpy", vectors=True),
    ratio(APPEND, 1 / 3, f"append warm {Shape(12500, retention=1.0)}", "bare write"),
    ratio(f"{GENERATE}: speed of a decoding step over the dense cache", 2.5, STEP, "dense cache"),
    # One of eight layers in full, and the rows kept of all.
    share(f"{GENERATE}: peak of the cache over the dense one", 1 / 8 + 0.15, f"generate 8 peak {PROMPT}"),
    *(target for sizes in ((32, 4096), (32, 32768), (8, 131072)) for target in _soft_topk(*sizes)),
    *(share(f"{op}: scratch over the input cache", 0.02, f"{op} scratch {LONG}") for op in ("evict", "evict_")),
    ratio("evict_, L=131072: speed of evict", 1, f"evict_ warm {LONG}", "evict"),
    *(target for half in HALF for target in _in_place(half)),
    ratio("linear in L: speed of four calls at L/4", SAME, f"evict scaling warm {LONG}", "4 x L/4"),
    ratio(QUARTERS, SAME, f"evict scaling warm {Shape(32768, retention=0.6)}", "4 x 15%"),
)


def _uniform(length: int) -> Target:
    """Skewed budgets beside uniform ones."""

    def predicted(gpu: Gpu) -> float:
        uniform, skewed = (predict(gpu, Shape(length, skewed=skewed)).total_us for skewed in (False, True))
        return uniform / skewed

    name = f"skewed budgets, L={length}: {UNIFORM}"
    return ratio(name, 1 / 1.1, _skewed("graph", length), "uniform", predict=predicted)


def evictions(run: Run) -> Iterator[tuple[Result, Shape]]:
    """The results of `evict` and `evict_layers` and the shapes that they are of."""
    for result in run.results:
        op = re.fullmatch(r"evict(?:_layers (\d+))?", result.op)
        shape = Shape.parse(result.shape, int(op[1] or 1)) if op else None
        if shape is not None and result.us:
            yield result, shape


def _shares_of_ceiling(run: Run) -> Iterator[Measured]:
    """Rates over that of a gather of random rows that are about as dense."""
    ceilings = [r for r in run.results if r.op == "ceiling random" and r.mode == "graph" and r.gbps]
    for result, shape in evictions(run):
        if ceilings and shape.moved_bytes > LARGE and result.mode == "graph" and shape.row_bytes == 256:
            ceiling = min(ceilings, key=lambda r: abs(r.retention - shape.retention))
            yield Measured(shape.moved_bytes / result.us / 1e3 / ceiling.gbps, result.case)


def _predicted_share(gpu: Gpu) -> float:
    large = [target.shape for target in TIMED if target.op != "select" and target.shape.moved_bytes > LARGE]
    return min(shape.moved_bytes / gpu.row_rate / predict(gpu, shape).total_us for shape in large)


def _over(
    name: str, bound: float, rivals: tuple[str, ...], counts: Callable[[Shape], bool] = lambda shape: True
) -> Target:
    """The least speed over rivals at any shape that counts."""

    def values(run: Run) -> Iterator[Measured]:
        for result, shape in evictions(run):
            for rival in rivals:
                if rival in result.ratios and counts(shape):
                    yield Measured(result.ratios[rival], f"{rival}, {result.case}")

    return Target(name, bound, values)


def _overhead(shape: Shape) -> bool | None:
    """Whether select and launches are over a third of the modelled time of an H200; None without the planner."""
    if not has_planner():
        return None
    found = predict(H200, shape)
    return (found.launch_us + found.select_us) / found.total_us > 1 / 3


TIMED = (
    *(timed(f"evict, L={n}", us, "evict", Shape(n)) for n, us in ((8192, 10), (32768, 20), (131072, 55))),
    *(timed(f"evict_layers, 32 x L={n}", us, "evict_layers", Shape(n, layers=32))
      for n, us in ((4096, 50), (32768, 350), (131072, 1400))),
    timed("select, 8 rows of L=131072", 15, "select", Shape(131072)),
)  # fmt: skip
GPU_TARGETS = (
    *TIMED,
    Target("evictions over 256 MB: share of the gather's ceiling", 0.9, _shares_of_ceiling, predict=_predicted_share),
    _uniform(8192),
    _uniform(131072),
    _over("any eviction: speed over rivals with stock gathers", 1.3, STOCK),
    _over("ragged budgets: speed over PyTorch", 5, PYTORCH, lambda shape: shape.skewed),
    _over("select and launches over a third: speed over CUB and our gather", 1.3, CUB, lambda s: _overhead(s) is True),
    _over("elsewhere: speed over CUB and our gather", 1, CUB, lambda shape: _overhead(shape) is False),
)
