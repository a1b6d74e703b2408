"""The three pictures of an evaluation, drawn from its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """`accuracy.png`, and `budgets.png` and `kept.png` where the report has what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_accuracy(report["rows"], folder / "accuracy.png")]
    if report.get("shares"):
        paths.append(_budgets(report["shares"], folder / "budgets.png"))
    if report.get("kept_positions"):
        paths.append(_kept(report["kept_positions"], folder / "kept.png"))
    return paths


def _accuracy(rows: Sequence[Mapping], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["retention"])
        if method in ("full", "floor"):
            axes.axhline(100 * points[0]["score"], color="0.5", ls="--" if method == "full" else ":", label=method)
            continue
        x, y = [100 * p["retention"] for p in points], [100 * p["score"] for p in points]
        learned = method == "lkv"
        line = axes.plot(x, y, marker="o", ms=4, lw=2.5 if learned else 1.2, zorder=3 if learned else 2, label=method)[
            0
        ]
        low, high = ([100 * p[side] for p in points] for side in ("low", "high"))
        axes.fill_between(x, low, high, alpha=0.12, color=line.get_color(), lw=0)
    axes.set(
        xlabel="rows kept, % of the cache",
        ylabel="accuracy, %",
        ylim=(-2, 102),
        title="After physical eviction",
    )
    axes.legend(fontsize=8, ncols=2)
    return _save(figure, path)


def _budgets(shares: Mapping[str, Sequence], path: Path) -> Path:
    figure, axes = plt.subplots(1, len(shares), figsize=(2.6 * len(shares) + 1, 3), layout="constrained", squeeze=False)
    for ax, (retention, table) in zip(axes[0], shares.items(), strict=True):
        values = 100 * np.asarray(table)
        image = ax.imshow(values, vmin=0, vmax=100, cmap="viridis")
        for (layer, head), value in np.ndenumerate(values) if values.size <= 64 else ():
            ax.text(head, layer, f"{value:.0f}", ha="center", va="center", fontsize=8, color="w" if value < 60 else "k")
        ax.set(title=f"{100 * float(retention):g} % of all rows", xlabel="KV head", ylabel="layer")
    figure.colorbar(image, ax=axes[0].tolist(), label="kept of the head, %")
    return _save(figure, path)


def _kept(kept: Mapping[str, Any], path: Path) -> Path:
    """Every row of dots is a head; marked are the tokens of the evidence."""
    heads = kept["heads"]
    figure, axes = plt.subplots(figsize=(9, 0.16 * len(heads) + 1.3), layout="constrained")
    for begin, end in kept["evidence"]:
        axes.axvspan(begin - 0.5, end - 0.5, color="tab:orange", alpha=0.35, lw=0)
    for y, head in enumerate(heads):
        axes.plot(head["positions"], [y] * len(head["positions"]), "|", color="k", ms=5)
    axes.set_yticks(range(len(heads)), [head["name"] for head in heads], fontsize=7)
    axes.set(
        xlim=(-1, kept["length"]), ylim=(len(heads) - 0.3, -0.7), xlabel="position in the text", title=kept["title"]
    )
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
