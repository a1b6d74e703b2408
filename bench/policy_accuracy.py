"""The table and the plot of docs/policies.md, from the report that `make policies-eval` writes.

python bench/policy_accuracy.py build/policies-eval --into docs/policies --page docs/policies.md

The table stands between two markers of the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import replace_between_markers, table

from lkv.evaluate.lines import BASELINES, styles
from lkv.policies.catalog import CATALOG

MARK = "accuracy"
Row = Mapping[str, Any]
TITLES = {  # as the papers name them
    "lkv": "LKV", "random": "random rows", "streaming_llm": "StreamingLLM", "snapkv": "SnapKV", "adakv": "Ada-KV",
    "kvzip": "KVzip", "lava": "LAVa", "lava_code": "LAVa, authors' code", "caote": "CAOTE", "fast_caote": "FastCAOTE",
    "squeeze": "SqueezeAttention", "h2o": "H2O", "criticalkv": "CriticalKV", "sagekv": "SAGE-KV", "tova": "TOVA",
    "rkv": "R-KV", "pyramidkv": "PyramidKV", "cake": "CAKE", "defensivekv": "DefensiveKV",
    "layer_defensivekv": "Layer-DefensiveKV", "expected_attention": "Expected Attention", "compactor": "Compactor",
    "knorm": "L2 norm of keys", "keydiff": "KeyDiff", "lagkv": "LagKV",
}  # fmt: skip
PAPERS = {"lkv": "2605.06676"} | {name: entry.paper for name, entry in CATALOG.items()}
FAMILIES = {
    "keys, values, positions": ("random", "streaming_llm", "knorm", "keydiff", "lagkv", "compactor"),
    "attention, all heads alike": (
        "snapkv", "tova", "h2o", "sagekv", "caote", "fast_caote", "criticalkv", "rkv", "expected_attention",
    ),
    "heads and layers share a budget": (
        "adakv", "lava", "lava_code", "defensivekv", "layer_defensivekv", "pyramidkv", "cake", "squeeze",
    ),
    "a second pass, and learned": ("kvzip", "lkv"),
}  # fmt: skip


def paper(name: str) -> str:
    number = PAPERS.get(name, "")
    return f"[{number}](https://arxiv.org/abs/{number})" if number[:1].isdigit() else number


def by_method(rows: Sequence[Row]) -> dict[str, dict[float, Row]]:
    found: dict[str, dict[float, Row]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["retention"]] = row
    return found


def ordered(found: Mapping[str, Mapping[float, Row]]) -> list[str]:
    """The full cache first, then by the mean over the retentions."""
    names = [name for name in found if name not in BASELINES]
    names.sort(key=lambda name: -sum(row["score"] for row in found[name].values()))
    return [*(name for name in BASELINES if name in found), *names]


def accuracy(rows: Sequence[Row]) -> str:
    """A line for each method: scores in percent, what was kept, and CPU time of a text."""
    found = by_method(rows)
    retentions = sorted({row["retention"] for row in rows if row["method"] not in BASELINES})
    head = ["method", "name", "paper", *(f"{100 * r:g} %" for r in retentions), "rows kept, %", "ms a text"]
    body = []
    for name in ordered(found):
        of = found[name]
        if name in BASELINES:
            row = next(iter(of.values()))
            title = "full cache" if name == "full" else "the first 4 rows and the last 32"
            kept = f"{100 * row['kept']:.1f}"
            body.append([title, f"`{name}`", "", *[f"{100 * row['score']:.1f}"] * len(retentions), kept, ""])
            continue
        spent = [of[r]["evict_ms"] + of[r]["second_pass_ms"] for r in retentions]
        body.append(
            [
                f"**{TITLES[name]}**" if name == "lkv" else TITLES[name],
                f"`{name}`",
                paper(name),
                *(f"{100 * of[r]['score']:.1f}" for r in retentions),
                " / ".join(f"{100 * of[r]['kept']:.1f}" for r in retentions),
                f"{sum(spent) / len(spent):.1f}",
            ]
        )
    return table(head, body)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel for each family; LKV and the full cache are in all of them."""
    found = by_method(rows)
    looks = styles(found)
    figure, grid = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained", sharex=True, sharey=True)
    for axes, (title, names) in zip(grid.flat, FAMILIES.items(), strict=True):
        for name in dict.fromkeys((*names, "lkv")):
            if name in found:
                points = sorted(
                    (100 * r, *(100 * row[x] for x in ("score", "low", "high"))) for r, row in found[name].items()
                )
                x, y, low, high = zip(*points, strict=True)
                axes.plot(x, y, ms=5, lw=2.5 if name == "lkv" else 1.2, label=TITLES[name], **looks[name])
                axes.fill_between(x, low, high, alpha=0.1, color=looks[name]["color"], lw=0)
        for name, look in BASELINES.items():
            if name in found:
                axes.axhline(100 * next(iter(found[name].values()))["score"], label=name, **look)
        axes.set(title=title, xlabel="rows kept, %", ylabel="accuracy, %", ylim=(-2, 102))
        axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with report.json")
    parser.add_argument("--into", type=Path, help="folder for a copy of the report, and the plot")
    parser.add_argument("--page", type=Path, help="with the two markers")
    args = parser.parse_args()
    rows = json.loads((args.folder / "report.json").read_text())["rows"]
    if args.into:
        args.into.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.folder / "report.json", args.into / "report.json")
        draw(rows, args.into / "families.png")
    shown = accuracy(rows)
    print(shown)
    if args.page:
        replace_between_markers(args.page, shown, MARK)


if __name__ == "__main__":
    main()
