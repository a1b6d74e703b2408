"""The pictures of evaluations, drawn from their JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lkv.evaluate.lines import BASELINES, styles

Point = tuple[float, float, float, float]  # retention, value, and the ends of its interval


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """`accuracy.png`, and `budgets.png` and `kept.png` where the report has what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_accuracy(report["rows"], folder / "accuracy.png")]
    if report.get("shares"):
        titles = {f"{100 * float(r):g} % of all rows": table for r, table in report["shares"].items()}
        paths.append(_budgets(titles, folder / "budgets.png"))
    if report.get("kept_positions"):
        paths.append(_kept(report["kept_positions"], folder / "kept.png"))
    return paths


def draw_texts(report: Mapping[str, Any], folder: Path, reference: str, retention: float = 0.15) -> list[Path]:
    """Of an evaluation on passages: `fidelity.png`, and `budgets.png` where some method's heads keep unequal shares.

    Args:
        reference: the method whose budgets come first.
        retention: of the budgets that are shown, or the one next to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in report["rows"] if row["domain"] == "all"]
    paths = [_fidelity(rows, folder / "fidelity.png")]
    tables = {}
    for method in sorted(report["shares"], key=lambda name: name != reference):
        of = report["shares"][method]
        nearest = min(of, key=lambda r: abs(float(r) - retention))
        if np.ptp(of[nearest]) > 0.01:
            tables[f"{method}, {100 * float(nearest):g} %"] = of[nearest]
    if tables:
        highest = 100 * max(np.max(table) for table in tables.values())
        paths.append(_budgets(tables, folder / "budgets.png", highest))
    return paths


def _accuracy(rows: Sequence[Mapping], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    points = _by_method(rows, lambda row: (row["score"], row["low"], row["high"]))
    _lines(axes, points, 100)
    axes.set(
        xlabel="rows kept, % of the cache",
        ylabel="accuracy, %",
        ylim=(-2, 102),
        title="After physical eviction",
    )
    axes.legend(fontsize=8, ncols=2)
    return _save(figure, path)


PANELS = (
    ("facts", "kl", "answers: KL to the full cache, nats a token"),
    ("facts", "exact", "answers: exact"),
    ("continuation", "kl", "continuation: KL to the full cache, nats a token"),
    ("continuation", "top1", "continuation: same next token as the full cache"),
)


def _fidelity(rows: Sequence[Mapping], path: Path) -> Path:
    """What is lost over the rows kept, one panel for each measure that the rows have."""
    panels = [x for x in PANELS if x[1] in rows[0].get(x[0], {})]
    figure, grid = plt.subplots(
        len(panels) // 2, 2, figsize=(10, 4 * (len(panels) // 2)), layout="constrained", squeeze=False
    )
    for axes, (part, name, title) in zip(grid.flat, panels, strict=True):
        points = _by_method(rows, lambda row, part=part, name=name: tuple(row[part][name]))
        if name == "kl":  # of the full cache it is 0
            points.pop("full", None)
            axes.set_yscale("log")
        _lines(axes, points, 1)
        axes.set(xlabel="rows kept, % of the cache", title=title)
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda x: len(x[0]))
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center")
    return _save(figure, path)


def _by_method(rows: Iterable[Mapping], value: Any) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {}
    for row in rows:
        points.setdefault(row["method"], []).append((row["retention"], *value(row)))
    return points


def _lines(axes: Axes, points: Mapping[str, Sequence[Point]], scale: float) -> None:
    """A line for each method with its intervals, and one across for those that do not depend on the retention."""
    looks = styles(points)
    for method, unsorted in points.items():
        x, y, low, high = (scale * np.array(values) for values in zip(*sorted(unsorted), strict=True))
        if method in BASELINES:
            axes.axhline(y[0], label=method, **BASELINES[method])
            continue
        bold = method == "lkv"
        axes.plot(
            x * 100 / scale, y, ms=5, lw=2.5 if bold else 1.2, zorder=3 if bold else 2, label=method, **looks[method]
        )
        axes.fill_between(x * 100 / scale, low, high, alpha=0.12, color=looks[method]["color"], lw=0)


def _budgets(tables: Mapping[str, Sequence], path: Path, highest: float = 100) -> Path:
    """Shares of layers and heads, by their titles; colours up to `highest`, in percent."""
    figure, axes = plt.subplots(1, len(tables), figsize=(2.6 * len(tables) + 1, 3), layout="constrained", squeeze=False)
    for ax, (title, table) in zip(axes[0], tables.items(), strict=True):
        values = 100 * np.asarray(table)
        image = ax.imshow(values, vmin=0, vmax=highest, cmap="viridis", aspect="equal" if values.size <= 64 else "auto")
        for (layer, head), value in np.ndenumerate(values) if values.size <= 64 else ():
            ax.text(head, layer, f"{value:.0f}", ha="center", va="center", fontsize=8, color="w" if value < 60 else "k")
        ax.set(title=title, xlabel="KV head", ylabel="layer")
        ax.set_xticks(range(values.shape[1]))
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
