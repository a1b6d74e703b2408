"""The time of evict against L, beside its rivals and the memcpy that bounds them all."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from results import Result, Run
from targets import BEST

TITLES = {
    "cold": "cold L2 cache",
    "graph": "CUDA graph, cold L2 cache",
    "fresh": "the call allocates its result",
    "warm": "the result goes into memory that is there already",
}
COMPOSED = ("best PyTorch composition", "#d98032", "^", "-")
LINES = {  # label, colour, marker, line
    "naive": ("naive: topk, sort, gather", "#9aa0a6", "s", "-"),
    "best": COMPOSED,
    "best out=": COMPOSED,
    "flashinfer": ("FlashInfer top_k, index_select", "#7a5bb5", "D", "-"),
    "triton": ("Triton select and gather", "#4a8f5c", "v", "-"),
    "memcpy": ("memcpy of the output", "#5f6368", "", "--"),
}
RATIO = {"ha": "center", "fontsize": 8.5, "color": "#a85a12"}


def draw(run: Run, path: Path) -> None:
    sweep = [r for r in run.results if r.op == "evict" and r.shape == f"[1, 8, {r.length}, 128] bf16 15%"]
    modes = [mode for mode in TITLES if sum(r.mode == mode for r in sweep) > 2]
    if not modes:
        return
    figure, axes = plt.subplots(1, len(modes), figsize=(5.2 * len(modes), 4.2), sharey=True, squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        _draw_mode(axis, sorted((r for r in sweep if r.mode == mode), key=lambda r: r.length))
        axis.set_title(TITLES[mode], fontsize=10)
    axes[0][0].legend(frameon=False, fontsize=9, loc="upper left")
    axes[0][0].set_ylabel("time of one call")
    place = run.machine.get("gpu") or f"{run.machine['cpu']}, {run.machine['threads']} threads"
    figure.suptitle(f"evict, K and V [1, 8, L, 128] in bf16, 15 % kept ({place})", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _draw_mode(axis: Axes, rows: list[Result]) -> None:
    lengths = [r.length for r in rows]
    ours = [r.us or 0.0 for r in rows]
    for name, (label, color, marker, line) in LINES.items():
        if all(name in r.ratios for r in rows):
            # By the ratios, which are medians within rounds, not by the rival's own median, which drifts.
            ratios = [_best(r) if name.startswith("best") else r.ratios[name] for r in rows]
            times = [ratio * us for ratio, us in zip(ratios, ours, strict=True)]
            axis.plot(lengths, times, color=color, marker=marker, linestyle=line, markersize=5, label=label)
    axis.plot(lengths, ours, color="#1a73e8", marker="o", linewidth=2.4, markersize=6, label="lkv_ext.evict", zorder=5)
    for r, us in zip(rows, ours, strict=True):
        rival = _best(r)
        axis.annotate(f"{rival:.1f}x", (r.length, us * rival), (0, 7), textcoords="offset points", **RATIO)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g} us" if us < 1000 else f"{us / 1000:g} ms"))
    axis.set_xlabel("L, tokens in the cache")
    axis.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _best(result: Result) -> float:
    return min(result.ratios[name] for name in (*BEST, "best out=") if name in result.ratios)
