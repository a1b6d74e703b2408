"""What an evaluation comes to: a table, and JSON that tables and plots are made from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lkv.evaluate.run import Result
from lkv.evaluate.statistics import difference, interval

Row = dict[str, Any]


def rows(results: Iterable[Result], reference: str = "lkv") -> list[Row]:
    """A row per method and retention: scores per task and over all, kept rows, time, and how far `reference` is ahead.

    The mean over all weighs every sample the same, whatever its task. `reference` is compared where it has answered the
    same samples at the same retention.
    """
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, result.retention), []).append(result)
    out: list[Row] = []
    for (method, retention), group in groups.items():
        ordered = sorted(group, key=_sample)
        scores = [r.score for r in ordered]
        mean = interval(scores)
        row: Row = {
            "method": method,
            "retention": retention,
            "score": mean.mean,
            "low": mean.low,
            "high": mean.high,
            "kept": _mean(r.kept for r in group),
            "evict_ms": 1e3 * _mean(r.evict_seconds for r in group),
            "second_pass_ms": 1e3 * _mean(r.second_pass_seconds for r in group),
            "samples": len(group),
            "tasks": {
                task: _mean(r.score for r in group if r.task == task) for task in dict.fromkeys(r.task for r in group)
            },
        }
        ours = sorted(groups.get((reference, retention), []), key=_sample)
        if method != reference and list(map(_sample, ours)) == list(map(_sample, ordered)):
            ahead = difference([r.score for r in ours], scores)
            row["behind"] = [ahead.mean, ahead.low, ahead.high]
        out.append(row)
    return out


def table(rows: Sequence[Row], reference: str = "lkv") -> str:
    """Markdown; scores in percent."""
    names = list(dict.fromkeys(name for row in rows for name in row["tasks"]))
    head = ["method", "retention", "kept", *names, "all", "95 %", f"{reference} is ahead by", "evict ms", "2nd pass ms"]
    lines = [head]
    for row in rows:
        behind = row.get("behind")
        lines.append(
            [
                str(row["method"]),
                f"{row['retention']:g}",
                f"{row['kept']:.1%}",
                *(f"{100 * row['tasks'][name]:.1f}" if name in row["tasks"] else "" for name in names),
                f"{100 * row['score']:.1f}",
                f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
                "" if behind is None else f"{100 * behind[0]:+.1f} ({100 * behind[1]:+.1f} to {100 * behind[2]:+.1f})",
                f"{row['evict_ms']:.1f}",
                f"{row['second_pass_ms']:.1f}" if row["second_pass_ms"] else "",
            ]
        )
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of a head and lines below it."""
    head, *rest = lines
    lines = [head, ["---"] * len(head), *rest]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines)


def write(path: Path, facts: Mapping[str, object], rows: Sequence[Row], extra: Mapping[str, object]) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"facts": dict(facts), "rows": list(rows), **extra}, indent=1) + "\n")
    os.replace(temporary, path)


def _sample(result: Result) -> tuple[str, int]:
    return result.task, result.index


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
