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
    "kvzip": "KVzip (second pass)",
    "snapkv": "SnapKV",
    "adakv": "AdaKV",
    "streaming_llm": "StreamingLLM",
    "random": "random",
}
FRONT = ("lkv", "kvzip", "adakv", "snapkv", "streaming_llm", "oracle")  # columns of the README
HEADINGS = {"lkv": "LKV", "oracle": "oracle, which knows the questions"}


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def ends(listed: Sequence[float]) -> str:
    mean, low, high = (number(x, 3) for x in listed)
    return f"{mean} ({low} to {high})"


def kept(row: Row) -> str:
    return f"{100 * row['retention']:g} %"


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Those of all domains together, by retention, then as `NAMES` has the methods; the full cache first."""
    places = {name: i for i, name in enumerate(NAMES)}
    chosen = [row for row in rows if row["domain"] == "all" and row["method"] in places]
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
    "domains": (".", domains),
    "unseen": ("unseen", fidelity),
    "unseen-domains": ("unseen", domains),
    "unseen-lead": ("unseen", lead),
}


def read(folder: Path) -> list[Row] | None:
    path = folder / "report.json"
    return json.loads(path.read_text())["rows"] if path.exists() else None


def tables(folder: Path) -> Iterator[tuple[str, str]]:
    """Markers and tables of the reports that there are."""
    for mark, (name, make) in TABLES.items():
        if (rows := read(folder / name)) is not None:
            yield mark, make(rows)


def take(source: Path, target: Path) -> None:
    """Copies reports and plots, of the folders within as well."""
    for path in sorted(source.rglob("*")):
        if path.name == "report.json" or path.suffix == ".png":
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with report.json of the first table, the others in folders")
    parser.add_argument("--into", type=Path, help="folder for copies of reports and plots")
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
