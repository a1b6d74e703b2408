"""The tables of docs/real-model.md and the README's first one, from the reports that `make smollm2-eval` writes.

python bench/real_model.py docs/real-model --page docs/real-model.md --readme README.md

Every table has its two markers in the page; a report that is not there leaves its tables as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from report import replace_between_markers, table

Row = Mapping[str, Any]
NAMES = {  # in the order of the tables
    "full": "full cache",
    "oracle": "oracle",
    "lkv": "**LKV**",
    "fixed": "**LKV, fixed shares**",
    "kvzip": "KVzip (second pass)",
    "lkv-h+snapkv": "SnapKV, LKV's fixed shares",
    "snapkv": "SnapKV",
    "adakv": "AdaKV",
    "streaming_llm": "StreamingLLM",
    "random": "random",
}
FRONT = ("lkv", "fixed", "kvzip", "adakv", "snapkv", "streaming_llm", "oracle")  # columns of the README
HEADINGS = {"fixed": "LKV, fixed shares", "lkv": "LKV", "oracle": "oracle, which knows the questions"}
SCORES = {"SnapKV": ("uniform+snapkv", "lkv-h+snapkv"), "KVzip": ("uniform+kvzip", "lkv-h+kvzip")}
LENGTHS = (1024, 2048, 4096)


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def ends(listed: Sequence[float]) -> str:
    mean, low, high = (number(x, 3) for x in listed)
    return f"{mean} ({low} to {high})"


def kept(row: Row) -> str:
    return f"{100 * row['retention']:g} %"


def ordered(rows: Sequence[Row], domain: str = "all") -> list[Row]:
    """Those of a domain by retention, then as `NAMES` has the methods; the full cache first."""
    places = {name: i for i, name in enumerate(NAMES)}
    chosen = [row for row in rows if row["domain"] == domain and row["method"] in places]
    return sorted(chosen, key=lambda row: (row["retention"] % 1, places[row["method"]]))


def fidelity(rows: Sequence[Row]) -> str:
    """All domains together."""
    head = ["kept", "method", "exact", "tokens", "KL to the full cache", "top-1"]
    continued = "continuation" in rows[0]
    body = []
    for row in ordered(rows):
        facts = row["facts"]
        cells = [kept(row), NAMES[row["method"]], number(facts["exact"][0], 2), number(facts["tokens"][0], 3)]
        cells += [ends(facts["kl"]), number(facts["top1"][0], 3)]
        if continued:
            cells += [ends(row["continuation"]["kl"]), number(row["continuation"]["top1"][0], 3)]
        body.append(cells)
    return table([*head, *(["continuation: KL", "top-1"] if continued else [])], body)


def domains(rows: Sequence[Row]) -> str:
    """KL of answers, exact, KL of the continuation, for each domain."""
    names = sorted({row["domain"] for row in rows} - {"all"})
    of = {(row["domain"], row["method"], row["retention"]): row for row in rows}

    def cell(row: Row) -> str:
        shown = [number(row["facts"]["kl"][0], 3), number(row["facts"]["exact"][0], 2)]
        return ", ".join([*shown, number(row["continuation"]["kl"][0], 3)])

    body = [
        [kept(row), NAMES[row["method"]], *(cell(of[name, row["method"], row["retention"]]) for name in names)]
        for row in ordered(rows)
    ]
    return table(["kept", "method", *(f"{name}: KL, exact, continuation" for name in names)], body)


def lead(rows: Sequence[Row]) -> str:
    """How far LKV is ahead on the same passages."""
    shown = {"facts kl": "KL of answers", "facts exact": "exact", "continuation kl": "KL of the continuation"}
    there = [name for name in shown if any(name in row.get("ahead", {}) for row in rows)]
    body = [
        [kept(row), NAMES[row["method"]].strip("*"), *(ends(row["ahead"][name]) for name in there)]
        for row in ordered(rows)
        if "ahead" in row
    ]
    return table(["kept", "LKV is ahead of", *(shown[name] for name in there)], body)


def grid(rows: Sequence[Row]) -> str:
    """Exact answers, and in brackets the KL of answers and of the continuation, of every score under both budgets."""
    of = {(row["method"], row["retention"]): row for row in rows if row["domain"] == "all"}
    scores = {**SCORES, "LKV-T": ("uniform+lkv-t", "lkv")}
    alias = {"uniform+snapkv": "snapkv"}

    def cell(method: str, retention: float) -> str:
        row = of[alias.get(method, method), retention]
        kls = (number(row[part]["kl"][0], 3) for part in ("facts", "continuation"))
        return f"{number(row['facts']['exact'][0], 2)} ({', '.join(kls)})"

    retentions = sorted({retention for _, retention in of} - {1.0})
    body = [
        [f"{100 * retention:g} %", budget, *(cell(pair[i], retention) for pair in scores.values())]
        for retention in retentions
        for i, budget in enumerate(("equal", "LKV-H"))
    ]
    return table(["kept", "budgets", *scores], body)


def costs(rows: Sequence[Row]) -> str:
    names = ("prefill", "second_pass", "scores", "eviction")
    together = ordered(rows)
    body = []
    for method in dict.fromkeys(row["method"] for row in together):
        each = [row["seconds"] for row in together if row["method"] == method]
        means = [sum(x[name] for x in each) / len(each) for name in names]
        body.append([NAMES[method], *(number(x, 3) if x >= 5e-4 else "" for x in means)])
    return table(["CPU seconds of a text", *(name.replace("_", " ") for name in names)], body)


def lengths(reports: Mapping[int, Sequence[Row]]) -> str:
    """A row for each method and retention that the longest texts have, a column for each length."""
    of = {(n, row["method"], row["retention"]): row for n, rows in reports.items() for row in ordered(rows)}

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        kls = (number(row[part]["kl"][0], 3) for part in ("facts", "continuation"))
        return f"{number(row['facts']['exact'][0], 2)} ({', '.join(kls)})"

    body = [
        [kept(row), NAMES[row["method"]], *(cell(of.get((n, row["method"], row["retention"]))) for n in reports)]
        for row in ordered(reports[max(reports)])
    ]
    return table(["kept", "method", *(f"{n:,} tokens" for n in reports)], body)


def front(rows: Sequence[Row]) -> str:
    """Of the README: exact answers and the KL of answers."""
    of = {(row["method"], row["retention"]): row["facts"] for row in rows if row["domain"] == "all"}
    there = [name for name in FRONT if any(method == name for method, _ in of)]
    body = [
        [
            f"{100 * retention:g} %",
            *(f"{of[name, retention]['exact'][0]:.2f} ({of[name, retention]['kl'][0]:.3g})" for name in there),
        ]
        for retention in sorted({x for _, x in of} - {1.0}, reverse=True)
        if all((name, retention) in of for name in there)
    ]
    return table(["kept", *(HEADINGS.get(name, NAMES[name]) for name in there)], body)


# The table between each pair of markers, and the report that it is of.
TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "trained": (".", fidelity),
    "costs": (".", costs),
    "domains": (".", domains),
    "unseen": ("unseen", fidelity),
    "unseen-domains": ("unseen", domains),
    "unseen-lead": ("unseen", lead),
    "seen": ("seen", fidelity),
    "grid": ("grid", grid),
}


def read(folder: Path) -> list[Row] | None:
    path = folder / "report.json"
    return json.loads(path.read_text())["rows"] if path.exists() else None


def tables(folder: Path) -> Iterator[tuple[str, str]]:
    """Markers and tables of the reports that there are."""
    for mark, (name, make) in TABLES.items():
        if (rows := read(folder / name)) is not None:
            yield mark, make(rows)
    paths = {n: folder / ("." if n == LENGTHS[0] else str(n)) for n in LENGTHS}
    long = {n: rows for n, path in paths.items() if (rows := read(path)) is not None}
    if len(long) > 1:
        yield "lengths", lengths(long)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with report.json of the first table, the others in folders")
    parser.add_argument("--page", type=Path, help="with markers of all tables")
    parser.add_argument("--readme", type=Path, help="with the markers of the first table")
    args = parser.parse_args()
    for mark, text in tables(args.folder):
        print(f"{mark}\n\n{text}\n")
        if args.page:
            replace_between_markers(args.page, text, mark)
    if args.readme and (rows := read(args.folder)) is not None:
        replace_between_markers(args.readme, front(rows), "accuracy")


if __name__ == "__main__":
    main()
