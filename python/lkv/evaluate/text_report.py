"""What an evaluation on passages comes to: rows for JSON and plots, and tables in markdown.

Intervals are of resampled passages, each drawn with all of its questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lkv.evaluate.report import Row, markdown
from lkv.evaluate.results import Cell
from lkv.evaluate.statistics import interval

ALL = "all"
Sums = tuple[float, float]  # over a passage: of what is measured, and of what it is a share of


@dataclass(frozen=True)
class Measure:
    """
    Attributes:
        part: "facts" or "continuation".
        of: sums of a cell.
        less_is_better: so that "ahead" has one sign.
    """

    part: str
    name: str
    of: Callable[[Cell], Sums]
    less_is_better: bool = False


def _facts(name: str, per: str | None = "tokens") -> Callable[[Cell], Sums]:
    def sums(cell: Cell) -> Sums:
        total = float(sum(x[name] for x in cell.facts))
        return total, float(sum(x[per] for x in cell.facts) if per else len(cell.facts))

    return sums


def _continuation(name: str) -> Callable[[Cell], Sums]:
    def sums(cell: Cell) -> Sums:
        assert cell.continuation is not None
        return float(cell.continuation[name]), float(cell.continuation["tokens"])

    return sums


FACTS = (
    Measure("facts", "exact", _facts("exact", None)),
    Measure("facts", "tokens", _facts("right")),
    Measure("facts", "kl", _facts("kl"), less_is_better=True),
    Measure("facts", "top1", _facts("same")),
)
GREEDY = Measure("facts", "greedy", _facts("greedy", None))
CONTINUATION = (
    Measure("continuation", "kl", _continuation("kl"), less_is_better=True),
    Measure("continuation", "top1", _continuation("same")),
)
COMPARED = (("facts", "kl"), ("facts", "exact"), ("continuation", "kl"))


def rows(cells: Iterable[Cell], reference: str = "lkv") -> list[Row]:
    """A row per domain, method and retention; the domain "all" comes first.

    `facts` and `continuation` have measures with their intervals `[mean, low, high]`, means over questions or tokens;
    `kinds` has those of the facts by the kind of their value. `ahead` says how far the reference is
    ahead on the same passages at the same retention, in the measures of `COMPARED`.
    """
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in sorted(cells, key=lambda x: x.passage):
        groups.setdefault((cell.method, cell.retention), []).append(cell)
    domains = sorted({cell.domain for group in groups.values() for cell in group})
    out = []
    for domain in [ALL, *(domains if len(domains) > 1 else [])]:
        chosen = {key: [x for x in group if domain in (ALL, x.domain)] for key, group in groups.items()}
        for (method, retention), group in chosen.items():
            if group:
                ours = chosen.get((reference, retention), []) if method != reference else []
                out.append({"domain": domain, "method": method, "retention": retention, **_row(group, ours)})
    return out


def shares(cells: Iterable[Cell]) -> dict[str, dict[str, list[list[float]]]]:
    """For each method and retention the share of its rows that every head keeps, `[N][H]`: the mean over passages."""
    groups: dict[tuple[str, float], list[np.ndarray]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.retention), []).append(np.array(cell.rows) / cell.tokens)
    out: dict[str, dict[str, list[list[float]]]] = {}
    for (method, retention), found in groups.items():
        out.setdefault(method, {})[f"{retention:g}"] = np.mean(found, 0).round(4).tolist()
    return out


def _row(group: Sequence[Cell], reference: Sequence[Cell]) -> Row:
    row: Row = {
        "passages": len(group),
        "documents": len({(x.domain, x.document) for x in group}),
        "kept": sum(x.kept for x in group) / len(group),
        "seconds": {name: sum(x.seconds[name] for x in group) / len(group) for name in group[0].seconds},
        **_measured(group, reference),
    }
    if "facts" in row:
        kinds = sorted({x["kind"] for cell in group for x in cell.facts})
        row["kinds"] = {kind: _kind(_of_kind(group, kind), _of_kind(reference, kind)) for kind in kinds}
    return row


def _measured(group: Sequence[Cell], reference: Sequence[Cell]) -> Row:
    """`facts`, `continuation` and `ahead`, as far as the cells have them."""
    row: Row = {}
    paired = [x.passage for x in reference] == [x.passage for x in group]
    for measure in measures(group):
        values, counts = zip(*map(measure.of, group), strict=True)
        row.setdefault(measure.part, {})[measure.name] = _listed(values, counts)
        if paired and (measure.part, measure.name) in COMPARED:
            theirs = [measure.of(x)[0] for x in reference]
            sign = 1 if measure.less_is_better else -1
            ahead = [sign * (a - b) for a, b in zip(values, theirs, strict=True)]
            row.setdefault("ahead", {})[f"{measure.part} {measure.name}"] = _listed(ahead, counts)
    return row


def _kind(group: Sequence[Cell], reference: Sequence[Cell]) -> Row:
    found = _measured(group, reference)
    ahead = {"ahead": found["ahead"]} if "ahead" in found else {}
    return {"questions": sum(len(x.facts) for x in group), **found["facts"], **ahead}


def _of_kind(group: Sequence[Cell], kind: str) -> list[Cell]:
    """The passages that have such facts, without the others."""
    some = (replace(x, facts=[f for f in x.facts if f["kind"] == kind], continuation=None) for x in group)
    return [x for x in some if x.facts]


def measures(group: Sequence[Cell]) -> list[Measure]:
    """Those that the cells have."""
    first = group[0]
    found = list(FACTS) if first.facts else []
    if first.facts and "greedy" in first.facts[0]:
        found.append(GREEDY)
    return found + (list(CONTINUATION) if first.continuation is not None else [])


def _listed(sums: Sequence[float], counts: Sequence[float]) -> list[float]:
    found = interval(sums, counts)
    return [found.mean, found.low, found.high]


def tables(rows: Sequence[Row], reference: str = "lkv") -> str:
    """Markdown: all domains together, then each domain, then what it costs."""
    together = [row for row in rows if row["domain"] == ALL]
    parts = [_table(together, reference)]
    domains = list(dict.fromkeys(row["domain"] for row in rows if row["domain"] != ALL))
    if domains:
        parts.append(_by_domain(rows, domains))
    parts.append(_costs(together))
    return "\n\n".join(parts)


def _table(rows: Sequence[Row], reference: str) -> str:
    names = [(part, name) for part in ("facts", "continuation") for name in rows[0].get(part, {})]
    compared = [
        f"{part} {name}" for part, name in COMPARED if any(f"{part} {name}" in r.get("ahead", {}) for r in rows)
    ]
    head = ["method", "kept", *(f"{part} {name}" for part, name in names)]
    head += [f"{reference} ahead: {name}" for name in compared]
    lines = []
    for row in rows:
        cells = [row["method"], f"{row['kept']:.1%}"]
        cells += [_shown(row[part][name], name) if name in row.get(part, {}) else "" for part, name in names]
        ahead = row.get("ahead", {})
        cells += [_shown(ahead[name], name, "+") if name in ahead else "" for name in compared]
        lines.append(cells)
    return markdown([head, *lines])


def _by_domain(rows: Sequence[Row], domains: Sequence[str]) -> str:
    shown = [("facts", "kl"), ("facts", "exact"), ("continuation", "kl")]
    there = [(part, name) for part, name in shown if name in rows[0].get(part, {})]
    lines = [["method", "kept", *(f"{domain}: {part} {name}" for domain in domains for part, name in there)]]
    of = {(row["domain"], row["method"], row["retention"]): row for row in rows}
    for row in rows:
        if row["domain"] == ALL:
            found = [of.get((domain, row["method"], row["retention"])) for domain in domains]
            means = ["" if x is None else _number(x[part][name][0], name) for x in found for part, name in there]
            lines.append([row["method"], f"{row['kept']:.1%}", *means])
    return markdown(lines)


def _costs(rows: Sequence[Row]) -> str:
    """Of each method, the mean over its retentions."""
    names = list(rows[0]["seconds"])
    lines = [["method", *(f"{name.replace('_', ' ')}, CPU s" for name in names)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        each = [row["seconds"] for row in rows if row["method"] == method]
        lines.append([method, *(f"{sum(x[name] for x in each) / len(each):.3f}" for name in names)])
    return markdown(lines)


def _shown(ends: Sequence[float], name: str, sign: str = "") -> str:
    """With the interval where it matters, or the table would be too wide."""
    mean, low, high = (_number(x, name, sign) for x in ends)
    return f"{mean} ({low} to {high})" if name.endswith(("kl", "exact")) else mean


def _number(value: float, name: str, sign: str = "") -> str:
    return f"{value:{sign}.{4 if name.endswith('kl') else 3}f}"
