"""The tables of docs/real-model.md and the README's first one, from the reports that `make smollm2-eval` writes.

python bench/real_model.py build/smollm2-eval --into docs/real-model --page docs/real-model.md --readme README.md

Every table has its two markers in the page; a report that is not there leaves its tables as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
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
    "snapkv": "SnapKV",
    "adakv": "AdaKV",
    "streaming_llm": "StreamingLLM",
    "random": "random",
}
FRONT = ("lkv", "fixed", "kvzip", "adakv", "snapkv", "streaming_llm", "oracle")  # columns of the README
HEADINGS = {"fixed": "LKV, fixed shares", "lkv": "LKV", "oracle": "oracle, which knows the questions"}
BUDGETS = ("equal", "LKV-H, fixed shares", "all heads compete")
SCORES = {  # methods with these budgets
    "SnapKV": ("snapkv", "lkv-h+snapkv", None),
    "KVzip": ("uniform+kvzip", "lkv-h+kvzip", "kvzip"),
    "LKV-T": ("uniform+lkv-t", "fixed", "lkv"),
}
LENGTHS = (1024, 2048, 4096)


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def ends(listed: Sequence[float]) -> str:
    mean, low, high = (number(x, 3) for x in listed)
    return f"{mean} ({low} to {high})"


def kept(row: Row) -> str:
    return f"{100 * row['retention']:g} %"


def brief(row: Row | None) -> str:
    """Exact answers, and in brackets the KL of answers and of the continuation."""
    if row is None:
        return ""
    kls = (number(row[part]["kl"][0], 3) for part in ("facts", "continuation"))
    return f"{number(row['facts']['exact'][0], 2)} ({', '.join(kls)})"


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
    """Exact answers, and in brackets the KL of answers and of the continuation, of all scores under all budgets."""
    of = {(row["method"], row["retention"]): row for row in rows if row["domain"] == "all"}
    body = [
        [f"{100 * retention:g} %", budget, *(brief(of.get((pair[i], retention))) for pair in SCORES.values())]
        for retention in sorted({retention for _, retention in of} - {1.0})
        for i, budget in enumerate(BUDGETS)
    ]
    return table(["kept", "budgets", *SCORES], body)


def lengths(reports: Mapping[int, Sequence[Row]]) -> str:
    """A row for each method and retention that the longest texts have, a column for each length."""
    of = {(n, row["method"], row["retention"]): row for n, rows in reports.items() for row in ordered(rows)}

    body = [
        [kept(row), NAMES[row["method"]], *(brief(of.get((n, row["method"], row["retention"]))) for n in reports)]
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
            *(f"{of[name, retention]['exact'][0]:.2f} ({of[name, retention]['kl'][0]:.3f})" for name in there),
        ]
        for retention in sorted({x for _, x in of} - {1.0}, reverse=True)
        if all((name, retention) in of for name in there)
    ]
    return table(["kept", *(HEADINGS.get(name, NAMES[name]) for name in there)], body)


# The table between each pair of markers, and the report that it is of.
TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "trained": (".", fidelity),
    "domains": (".", domains),
    "unseen": ("unseen", fidelity),
    "unseen-domains": ("unseen", domains),
    "unseen-lead": ("unseen", lead),
    "seen": ("seen", fidelity),
    "grid": (".", grid),
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


def take(source: Path, target: Path) -> None:
    """Copies all reports, and the plots of the first table."""
    for path in (*sorted(source.rglob("report.json")), *sorted(source.glob("*.png"))):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with report.json of the first table, the others in folders")
    parser.add_argument("--into", type=Path, help="folder for copies of the reports and of the first plots")
    parser.add_argument("--page", type=Path, help="with markers of all tables")
    parser.add_argument("--readme", type=Path, help="with the markers of the first table")
    args = parser.parse_args()
    if args.into:
        take(args.folder, args.into)
    for mark, text in tables(args.folder):
        print(f"{mark}\n\n{text}\n")
        if args.page:
            replace_between_markers(args.page, text, mark)
    if args.readme and (rows := read(args.folder)) is not None:
        replace_between_markers(args.readme, front(rows), "accuracy")


if __name__ == "__main__":
    main()
