"""The report: which results a row is made of, what stands in the table, and what a file gives when it is read again."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lkv.evaluate import report
from lkv.evaluate.run import Result, by_method
from lkv.evaluate.statistics import difference, interval

# Task a has three samples, task b one: a mean over samples is not the mean over tasks.
SCORES = {
    "full": {"a": [1, 1, 1], "b": [1]},
    "lkv": {"a": [1, 0.5, 1], "b": [0]},
    "snapkv": {"a": [0, 1, 0.25], "b": [1]},
}


def results(scores: dict[str, dict[str, list[float]]] = SCORES, retention: float = 0.15) -> list[Result]:
    return [
        Result(
            task,
            i,
            method,
            1.0 if method == "full" else retention,
            score,
            1.0 if method == "full" else 0.1 + 0.02 * i,
            "",
            0.001 * (1 + i),
            0.25 * i if method == "snapkv" else 0.0,
        )
        for method, tasks in scores.items()
        for task, values in tasks.items()
        for i, score in enumerate(values)
    ]


def test_a_row_weighs_samples_the_same_and_has_means_per_task() -> None:
    full, lkv, snapkv = report.rows(results())
    assert [row["method"] for row in (full, lkv, snapkv)] == ["full", "lkv", "snapkv"]
    assert (full["score"], lkv["score"], snapkv["score"]) == (1.0, 2.5 / 4, 2.25 / 4)
    assert lkv["tasks"] == {"a": pytest.approx(2.5 / 3), "b": 0.0}
    assert snapkv["tasks"] == {"a": pytest.approx(1.25 / 3), "b": 1.0}
    assert (full["retention"], lkv["retention"], lkv["samples"]) == (1.0, 0.15, 4)


def test_ends_are_those_of_the_interval_over_all_samples() -> None:
    for row, scores in zip(report.rows(results()), ([1, 1, 1, 1], [1, 0.5, 1, 0], [0, 1, 0.25, 1]), strict=True):
        expected = interval(scores)
        assert (row["score"], row["low"], row["high"]) == (expected.mean, expected.low, expected.high)


def test_kept_and_times_are_means_of_what_was_measured() -> None:
    _, lkv, snapkv = report.rows(results())
    assert lkv["kept"] == pytest.approx((0.1 + 0.12 + 0.14 + 0.1) / 4)
    assert lkv["evict_ms"] == pytest.approx((1 + 2 + 3 + 1) / 4)
    assert lkv["second_pass_ms"] == 0.0
    assert snapkv["second_pass_ms"] == pytest.approx(1000 * (0 + 0.25 + 0.5 + 0) / 4)


def test_how_far_the_reference_is_ahead_is_paired_by_sample() -> None:
    _, lkv, snapkv = report.rows(results())
    expected = difference([1, 0.5, 1, 0], [0, 1, 0.25, 1])
    assert snapkv["behind"] == [expected.mean, expected.low, expected.high]
    assert snapkv["behind"][0] == pytest.approx(0.25 / 4) and snapkv["behind"][1] < snapkv["behind"][2]
    assert "behind" not in lkv
    (_, other, _) = report.rows(results(), reference="snapkv")
    assert other["behind"] == [pytest.approx(-0.25 / 4), pytest.approx(-expected.high), pytest.approx(-expected.low)]


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_results_does_not_matter(seed: int) -> None:
    mixed = results() + results(retention=0.3)
    random.Random(seed).shuffle(mixed)
    got = {(row["method"], row["retention"]): row for row in report.rows(mixed)}
    for retention in (0.15, 0.3):
        for row in report.rows(results(retention=retention)):
            other = got[row["method"], row["retention"]]
            if row["method"] == "full":  # is there twice
                continue
            for name in ("score", "low", "high", "behind"):
                assert other.get(name) == row.get(name), (name, row["method"])
            assert other["tasks"] == pytest.approx(row["tasks"])


def test_the_reference_is_compared_at_the_same_retention_and_on_the_same_samples() -> None:
    assert "behind" not in report.rows(results())[0]  # full has a retention of its own
    better = [replace(r, retention=0.3, score=1.0) for r in results() if r.method == "lkv"]
    rows = report.rows(results() + better)
    assert rows[2]["behind"][0] == pytest.approx(0.25 / 4)
    lacking = [r for r in results() if (r.method, r.task, r.index) != ("lkv", "a", 1)]
    assert "behind" not in report.rows(lacking)[2]
    # As many, but others.
    others = [replace(r, index=r.index + 1) if r.method == "lkv" else r for r in results()]
    assert "behind" not in report.rows(others)[2]


def test_grouping_is_by_method_and_retention() -> None:
    both = results() + results(retention=0.3)
    groups = by_method(both)
    assert list(groups) == [
        ("full", 1.0), ("lkv", 0.15), ("snapkv", 0.15), ("lkv", 0.3), ("snapkv", 0.3),
    ]  # fmt: skip
    assert groups["lkv", 0.3] == [r for r in both if r.method == "lkv" and r.retention == 0.3]
    assert len(report.rows(both)) == len(groups)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_table() -> None:
    text = report.table(report.rows(results({**SCORES, "best": {"b": [2 / 3]}})))
    head, rule, full, lkv, snapkv, best = cells(text)
    assert head == [
        "method", "retention", "kept", "a", "b", "all", "95 %", "lkv is ahead by", "evict ms", "2nd pass ms",
    ]  # fmt: skip
    assert set(rule) == {"---"}
    assert full[:7] == ["full", "1", "100.0%", "100.0", "100.0", "100.0", "100.0 to 100.0"]
    assert full[7:] == ["", "1.8", ""]
    ends = interval([1, 0.5, 1, 0])
    assert lkv == [
        "lkv", "0.15", "11.5%", "83.3", "0.0", "62.5", f"{100 * ends.low:.1f} to {100 * ends.high:.1f}", "", "1.8", "",
    ]  # fmt: skip
    ahead = difference([1, 0.5, 1, 0], [0, 1, 0.25, 1])
    assert snapkv[3:6] == ["41.7", "100.0", "56.2"]
    assert snapkv[7:] == [f"+6.2 ({100 * ahead.low:+.1f} to {100 * ahead.high:+.1f})", "1.8", "187.5"]
    assert ahead.low < 0 < ahead.high
    assert best[3:6] == ["", "66.7", "66.7"]  # nothing for a task that it did not run
    assert len({len(line) for line in text.splitlines()}) == 1


def test_a_tie_with_the_reference_is_marked() -> None:
    same = {"lkv": {"a": [1, 0]}, "other": {"a": [1, 0]}}
    *_, other = cells(report.table(report.rows(results(same))))
    assert other[6] == "+0.0 (+0.0 to +0.0)"


def test_tasks_keep_their_order_in_the_table() -> None:
    head, *_ = cells(report.table(report.rows(results({"lkv": {"b": [1], "a": [0]}}))))
    assert head[3:5] == ["b", "a"]


def test_report_file_is_read_back_as_it_was(tmp_path: Path) -> None:
    rows = report.rows(results())
    path = tmp_path / "new" / "folder" / "report.json"
    report.write(path, {"model": "x", "question_seen": False}, rows, {"shares": {"0.15": [[0.5, 0.25]]}})
    answers_now = json.loads(path.read_text())
    assert answers_now == {
        "facts": {"model": "x", "question_seen": False},
        "rows": rows,
        "shares": {"0.15": [[0.5, 0.25]]},
    }
    assert report.table(answers_now["rows"]) == report.table(rows)
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.write(path, {}, report.rows(results()), {})
    before = path.read_text()
    with pytest.raises(TypeError):
        report.write(path, {"model": object()}, [], {})
    assert path.read_text() == before
