"""What the project promises of the CPU path, as data, and whether a run keeps it, on whatever instruction set.

Shapes are bf16, D=128, B=1, H=8, 15 % kept, fp32 scores, budgets in an int32 tensor on the host, 2 threads; ratios are
medians within one run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from results import Run
from shapes import Shape

SKEW = 1.15
LINEAR = 1.15
BEST = ("best", "best by mask")  # which of them is faster depends on the shape


@dataclass(frozen=True)
class Target:
    """A bound of one quantity: a ratio to the rival of this name, "scratch", or "best": to the fastest composition."""

    says: str
    case: str
    quantity: str
    bound: float
    vectors: bool = False  # the rival computes on vectors of the machine, so no promise for the portable kernels
    short: str = ""  # heads a column of the README's table of instruction sets

    def promised(self, run: Run) -> bool:
        return not (self.vectors and run.machine.get("cpu_isa") == "portable")

    def measured(self, run: Run) -> float | None:
        result = run.find(self.case)
        if result is None:
            return None
        if self.quantity == "scratch":
            return result.share
        names = BEST if self.quantity == "best" else (self.quantity,)
        return min((result.ratios[name] for name in names if name in result.ratios), default=None)

    def met(self, value: float) -> bool:
        return value <= self.bound if self.quantity == "scratch" else value >= self.bound


def _evict(mode: str, length: int, skewed: bool = False) -> str:
    return f"evict {mode} {Shape(length, skewed=skewed)}"


def _attend(quantity: str, says: str, bound: float, short: str = "") -> Target:
    return Target(
        f"attend, 32768 tokens, skewed: {says}",
        f"attend warm {Shape(32768, skewed=True)}",
        quantity,
        bound,
        True,
        short,
    )


def _generate(what: str) -> str:
    return f"generate 8 {what} {Shape(16384, dim=64, dtype=torch.float32)}"


def _soft_topk(rows: int, length: int) -> tuple[Target, ...]:
    shape = f"[{rows}, {length}] fp32 15% T=0.1"
    says = {"fwd": "forward", "both": "forward and backward"}
    return tuple(
        Target(
            f"soft_topk, [{rows}, {length}]: {what}, speed over the best composition",
            f"soft_topk {mode} {shape}",
            "best",
            4,
            True,
            f"`soft_topk` [{rows}, {length}] {what}" if (rows, length) == (32, 4096) else "",
        )
        for mode, what in says.items()
    )


def _select(length: int) -> str:
    return f"select fresh {Shape(length)}"


TARGETS = (
    Target("evict, L=131072, fresh: speed over the naive pipeline", _evict("fresh", 131072), "naive", 10),
    Target(
        "evict, L=131072, fresh: speed over the best composition",
        _evict("fresh", 131072),
        "best",
        1.8,
        short="`evict` 131072 over best",
    ),
    Target("evict, L=131072, fresh: speed of clone", _evict("fresh", 131072), "memcpy", 0.9, short="over clone"),
    Target("evict, L=131072, warm: speed over the best composition", _evict("warm", 131072), "best out=", 2.2),
    Target("evict, L=131072, warm: speed of memcpy", _evict("warm", 131072), "memcpy", 0.4),
    Target(
        "evict, L=8192: speed over the best composition",
        _evict("fresh", 8192),
        "best",
        3,
        short="`evict` 8192 over best",
    ),
    Target("select, L=131072: speed over topk", _select(131072), "topk", 10, short="`select` 131072 over topk"),
    Target("select, L=131072: speed over topk(sorted=False)", _select(131072), "topk unsorted", 5),
    Target("select, L=8192: speed over topk", _select(8192), "topk", 3.5, short="`select` 8192 over topk"),
    Target("skewed budgets, L=131072: speed of uniform ones", _evict("fresh", 131072, True), "uniform", 1 / SKEW),
    Target("skewed budgets, L=8192: speed of uniform ones", _evict("fresh", 8192, True), "uniform", 1 / SKEW),
    Target("ragged budgets, L=131072: speed over the per-head loop", _evict("fresh", 131072, True), "loop", 5),
    Target("ragged budgets, L=8192: speed over the per-head loop", _evict("fresh", 8192, True), "loop", 5),
    Target(
        "[1, 2, 16, 8]: speed over the naive pipeline",
        f"evict fresh {Shape(16, heads=2, dim=8, retention=0.5)}",
        "naive",
        1.5,
        short="`evict` [1, 2, 16, 8] over naive",
    ),
    _attend("dense", "speed over SDPA on the dense cache", 5, "`attend` over dense SDPA"),
    _attend("padded", "speed over SDPA on the padded cache", 2),
    _attend("memcpy", "read rate over that of memcpy", 0.6),
    Target(
        "append of a token at 100k kept rows: speed of a bare write of its rows",
        f"append warm {Shape(12500, retention=1.0)}",
        "bare write",
        1 / 3,
    ),
    Target(
        "generate, 16k prompt: speed of a decoding step over the dense cache", _generate("step"), "dense cache", 2.5
    ),
    # One of eight layers in full, and the rows kept of all.
    Target("generate, 16k prompt: peak of the cache over the dense one", _generate("peak"), "scratch", 1 / 8 + 0.15),
    *(target for sizes in ((32, 4096), (32, 32768), (8, 131072)) for target in _soft_topk(*sizes)),
    Target("evict: scratch over the input cache", f"evict scratch {Shape(131072)}", "scratch", 0.02),
    Target("evict_: scratch over the input cache", f"evict_ scratch {Shape(131072)}", "scratch", 0.02),
    Target("linear in L: speed of four calls at L/4", f"evict scaling warm {Shape(131072)}", "4 x L/4", 1 / LINEAR),
    Target(
        "linear in kept rows: speed of four calls at a quarter of the budget",
        f"evict scaling warm {Shape(32768, retention=0.6)}",
        "4 x 15%",
        1 / LINEAR,
    ),
)


def table(run: Run) -> str:
    """Markdown: every target, what was measured, met or missed."""
    lines = ["| target | bound | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        value = target.measured(run)
        scratch = target.quantity == "scratch"
        bound = f"at most {100 * target.bound:.0f} %" if scratch else f"at least {target.bound:.2g}x"
        said = "" if value is None else f"{100 * value:.2f} %" if scratch else f"{value:.2f}x"
        verdict = "not measured" if value is None else "met" if target.met(value) else "missed"
        verdict = verdict if target.promised(run) else "no promise"
        lines.append(f"| {target.says} | {bound} | {said} | {verdict} |")
    return "\n".join(lines)


def sets_table(runs: list[Run]) -> str:
    """Markdown: a row for each instruction set, where it was measured, and the targets that have a short name."""
    named = [target for target in TARGETS if target.short]
    lines = [f"| | measured on | {' | '.join(target.short for target in named)} |", "|---" * (2 + len(named)) + "|"]
    for run in runs:
        values = [(target, target.measured(run)) for target in named]
        said = [
            "" if v is None else f"{v:.2f}x" + ("" if t.met(v) or not t.promised(run) else " (missed)")
            for t, v in values
        ]
        where = f"{run.machine['cpu']}, {run.machine['threads']} threads, {str(run.machine['date']).split()[0]}"
        lines.append(f"| {run.machine['cpu_isa']} | {where} | {' | '.join(said)} |")
    return "\n".join(lines)
