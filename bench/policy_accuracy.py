"""The tables and plots of docs/policies.md, from the reports of `make policies-eval` and `make policies-smollm2`.

python bench/policy_accuracy.py build/policies-eval --into docs/policies --page docs/policies.md

Every table stands between two markers of the page; a report that is not there leaves its table as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import replace_between_markers, table

from lkv.evaluate.lines import BASELINES, styles
from lkv.evaluate.oracle import ORACLES
from lkv.policies.catalog import CATALOG

Row = Mapping[str, Any]
TITLES = {  # as the papers name them
    "full": "full cache", "floor": "the first 4 rows and the last 32", "oracle": "oracle, all heads compete",
    "uniform+oracle": "oracle, equal budgets",
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


@dataclass(frozen=True)
class Measure:
    """What a panel of a plot shows: `[value, low, high]` of a row, and how high or low it may be."""

    of: Callable[[Row], Sequence[float]]
    label: str
    limits: tuple[float, float] | None = None
    scale: str = "linear"


@dataclass(frozen=True)
class Kind:
    """A kind of report.

    Attributes:
        folder: where its report lies, of that of the first one. mark: of its table in the page.
        cell: what the table has for a method and a retention. better: the higher, the further up a method stands.
        spent: what a text cost, in the unit of `cost`. more: a further column and its number of a row.
    """

    folder: str
    mark: str
    cell: Callable[[Row], str]
    better: Callable[[Row], float]
    cost: str
    spent: Callable[[Row], float]
    measures: tuple[Measure, ...]
    more: tuple[str, Callable[[Row], str]] | None = None


def _percent(row: Row) -> list[float]:
    return [100 * row[name] for name in ("score", "low", "high")]


def _fidelity(row: Row) -> str:
    facts = row["facts"]
    return f"{facts['exact'][0]:.2f}, {facts['tokens'][0]:.3f}, {facts['kl'][0]:.3f}"


KINDS = (
    Kind(
        ".",
        "accuracy",
        cell=lambda row: f"{100 * row['score']:.1f}",
        better=lambda row: row["score"],
        cost="ms a text",
        spent=lambda row: row["evict_ms"] + row["second_pass_ms"],
        measures=(Measure(_percent, "accuracy, %", (-2, 102)),),
    ),
    Kind(
        "smollm2",
        "fidelity",
        cell=_fidelity,
        better=lambda row: -row["facts"]["kl"][0],
        cost="ms a text",
        spent=lambda row: 1000 * sum(seconds for name, seconds in row["seconds"].items() if name != "prefill"),
        measures=(
            Measure(lambda row: row["facts"]["kl"], "answers: KL, nats a token", scale="log"),
            Measure(lambda row: row["continuation"]["kl"], "continuation: KL, nats a token", scale="log"),
        ),
        more=("KL of the continuation", lambda row: f"{row['continuation']['kl'][0]:.3f}"),
    ),
)


def paper(name: str) -> str:
    number = PAPERS.get(name, "")
    return f"[{number}](https://arxiv.org/abs/{number})" if number[:1].isdigit() else number


def by_method(rows: Sequence[Row]) -> dict[str, dict[float, Row]]:
    found: dict[str, dict[float, Row]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["retention"]] = row
    return found


def ordered(found: Mapping[str, Mapping[float, Row]], kind: Kind) -> list[str]:
    """What is no method first, then by the mean over the retentions."""
    first = [*BASELINES, *ORACLES]
    names = [name for name in found if name not in first]
    names.sort(key=lambda name: -sum(map(kind.better, found[name].values())))
    return [*(name for name in first if name in found), *names]


def methods(rows: Sequence[Row], kind: Kind) -> str:
    """A line for each method: what was measured at every retention, what was kept, and CPU time of a text."""
    found = by_method(rows)
    retentions = sorted({row["retention"] for row in rows if row["method"] not in BASELINES})
    more = [kind.more[0]] if kind.more else []
    head = ["method", "name", "paper", *(f"{100 * r:g} %" for r in retentions), *more, "rows kept, %", kind.cost]
    body = []
    for name in ordered(found, kind):
        if name in BASELINES:  # the same at all retentions
            row = next(iter(found[name].values()))
            cells = [kind.cell(row)] * len(retentions)
            last = [f"{100 * row['kept']:.1f}", ""]
            more = [kind.more[1](row)] if kind.more else []
        else:
            of = [found[name][r] for r in retentions]
            cells = [kind.cell(row) for row in of]
            spent = sum(map(kind.spent, of)) / len(of)
            last = [" / ".join(f"{100 * row['kept']:.1f}" for row in of), f"{spent:.1f}"]
            more = [" / ".join(map(kind.more[1], of))] if kind.more else []
        title = f"**{TITLES[name]}**" if name == "lkv" else TITLES[name]
        body.append([title, f"`{name}`", paper(name), *cells, *more, *last])
    return table(head, body)


def draw(rows: Sequence[Row], kind: Kind, path: Path) -> None:
    """A panel for each family and measure; LKV, an oracle and the full cache are in all of them."""
    found = by_method(rows)
    looks = styles(found)
    panels = list(product(FAMILIES.items(), kind.measures))
    many = len(kind.measures) > 1
    figure, grid = plt.subplots(
        *(len(panels) // 2, 2), figsize=(11, 4.25 * len(panels) / 2), layout="constrained", sharex=True,
        sharey="col" if many else True,
    )  # fmt: skip
    for axes, ((title, names), measure) in zip(grid.flat, panels, strict=True):
        for name in dict.fromkeys((*names, "lkv", "oracle")):
            if name in found:
                points = sorted((100 * r, *measure.of(row)) for r, row in found[name].items())
                x, y, low, high = zip(*points, strict=True)
                axes.plot(x, y, ms=5, lw=2.5 if name == "lkv" else 1.2, label=TITLES[name], **looks[name])
                axes.fill_between(x, low, high, alpha=0.1, color=looks[name]["color"], lw=0)
        for name, look in BASELINES.items():
            if name in found and measure.scale == "linear":
                axes.axhline(measure.of(next(iter(found[name].values())))[0], label=name, **look)
        axes.set(title=title, xlabel="rows kept, %", ylabel=measure.label, yscale=measure.scale)
        if measure.limits:
            axes.set_ylim(*measure.limits)
        axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def reports(folder: Path) -> Iterator[tuple[Kind, dict[str, Any]]]:
    """Those that there are, without what no table or plot shows: domains apart, kinds of facts, shares of heads."""
    for kind in KINDS:
        path = folder / kind.folder / "report.json"
        if path.exists():
            report = json.loads(path.read_text())
            rows = [row for row in report["rows"] if row.get("domain", "all") == "all"]
            short = [{name: value for name, value in row.items() if name != "kinds"} for row in rows]
            yield kind, {"facts": report["facts"], "rows": short}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with report.json of the first table, that of SmolLM2 in a folder")
    parser.add_argument("--into", type=Path, help="folder for copies of the reports, and the plots")
    parser.add_argument("--page", type=Path, help="with the markers")
    args = parser.parse_args()
    for kind, report in reports(args.folder):
        if args.into:
            into = args.into / kind.folder
            into.mkdir(parents=True, exist_ok=True)
            (into / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            draw(report["rows"], kind, into / "families.png")
        shown = methods(report["rows"], kind)
        print(f"{kind.mark}\n\n{shown}\n")
        if args.page:
            replace_between_markers(args.page, shown, kind.mark)


if __name__ == "__main__":
    main()
