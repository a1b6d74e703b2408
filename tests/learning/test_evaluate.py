"""Evaluation: the rows are really gone, methods see the same texts, and the statistics say what they claim."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import tasks
from lkv.evaluate import report
from lkv.evaluate.methods import FLOOR, FULL, Method, choose, heuristics, learned
from lkv.evaluate.plots import draw
from lkv.evaluate.run import Result, Setting, evaluate, found
from lkv.evaluate.statistics import difference, interval
from lkv.learn.checkpoint import Design, Shape
from lkv.policies.lkv import LKV
from lkv.text import encode

SETTING = Setting(retentions=(0.5, 0.8), batch=3, limit=5)


def samples(count: int = 3) -> list[tasks.Sample]:
    return [tasks.make("multi_key", i, 128) for i in range(count)]


def known(model: PreTrainedModel) -> dict[str, object]:
    torch.manual_seed(5)
    return heuristics() | learned(Design(hidden=8).build(Shape.of(model)))


def test_every_method_keeps_what_it_was_allowed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    policies = known(model)
    methods = choose([FULL, FLOOR, *policies], policies)
    results = list(evaluate(model, tokenizer, samples(), methods, SETTING))
    assert len(results) == 3 * (1 + 2 * (1 + len(policies)))
    for result in results:
        expected = {FULL: 1.0, FLOOR: 36 / 129}.get(result.method, result.retention)
        assert result.kept == pytest.approx(expected, abs=1 / 128), result
        assert 0 <= result.score <= 1
        assert (result.second_pass_seconds > 0) == ("kvzip" in result.method)


def test_full_is_generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    results = list(evaluate(model, tokenizer, samples(), [Method(FULL, None)], SETTING))
    for sample, result in zip(samples(), results, strict=True):
        prompt = encode(tokenizer, sample.context, begins=True) + encode(tokenizer, sample.question)
        out = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert result.text == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("see", [False, True])
def test_texts_of_different_length_are_answered_as_each_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, see: bool
) -> None:
    mixed = [tasks.make("multi_key", i, length) for i, length in enumerate((100, 128, 113))]
    policies = known(model)
    # Not LKV: the same word twice has one score in the first layer, and rounding decides which of the two is kept.
    methods = choose([FULL, "streaming", "snapkv", "kvzip"], policies)
    setting = replace(SETTING, see_question=see)
    together = list(evaluate(model, tokenizer, mixed, methods, setting))
    alone = [r for s in mixed for r in evaluate(model, tokenizer, [s], methods, setting)]
    key = lambda r: (r.method, r.retention, r.index)  # noqa: E731
    for a, b in zip(sorted(together, key=key), sorted(alone, key=key), strict=True):
        assert (a.text, a.kept) == (b.text, pytest.approx(b.kept)), key(a)


def test_unknown_methods_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="expected methods of full, floor, random, .* got 'h2o'"):
        choose(["h2o"], known(model))


def test_found_counts_expected_strings() -> None:
    assert found("41 87 . 12 34", ("41 87", "12 34")) == 1
    assert found("41 87 .", ("41 87", "12 34")) == 0.5
    assert found("", ("41 87",)) == 0


class TestStatistics:
    def test_interval_of_a_mean(self) -> None:
        got = interval([1] * 280 + [0] * 120)
        assert got.mean == pytest.approx(0.7)
        half = 1.96 * (got.mean * (1 - got.mean) / 400) ** 0.5
        assert got.low == pytest.approx(got.mean - half, abs=0.01)
        assert got.high == pytest.approx(got.mean + half, abs=0.01)

    def test_a_paired_difference_is_sharper_than_two_intervals(self) -> None:
        rng = np.random.default_rng(1)
        first = (rng.random(300) < 0.6).astype(np.float64)
        second = first.copy()
        second[np.flatnonzero(first)[:9]] = 0  # worse on three samples in a hundred, better on none
        ahead = difference(first, second)
        assert ahead.mean == pytest.approx(0.03)
        assert 0 < ahead.low < ahead.mean < ahead.high
        assert interval(first).low < interval(second).mean


def results() -> list[Result]:
    scores = {"full": [1, 1, 1, 1], "lkv": [1, 1, 1, 0], "snapkv": [1, 0, 0, 0]}
    return [
        Result(task, i, method, 1.0 if method == "full" else 0.15, x, 0.15, "", 0.01)
        for method, xs in scores.items()
        for i, (task, x) in enumerate(zip(("a", "a", "b", "b"), xs, strict=True))
    ]


def test_rows_table_and_plots(tmp_path: Path) -> None:
    rows = report.rows(results())
    assert [(row["method"], row["score"]) for row in rows] == [("full", 1.0), ("lkv", 0.75), ("snapkv", 0.25)]
    assert rows[1]["tasks"] == {"a": 1.0, "b": 0.5}
    assert rows[2]["behind"][0] == 0.5
    text = report.table(rows)
    assert "| snapkv | 0.15 | 15.0% | 50.0 | 0.0 | 25.0 |" in re.sub(" +", " ", text)
    extra = {
        "shares": {"0.15": [[0.1, 0.2], [0.05, 0.25]]},
        "kept_positions": {
            "heads": [{"name": "layer 0, head 0", "positions": [0, 3]}],
            "evidence": [[2, 5]],
            "length": 9,
            "title": "one",
        },
    }
    report.write(tmp_path / "report.json", {"model": "x"}, rows, extra)
    paths = draw(json.loads((tmp_path / "report.json").read_text()), tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "budgets.png", "kept.png"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_lkv_is_one_of_the_learned(model: PreTrainedModel) -> None:
    lkv = Design(hidden=8).build(Shape.of(model))
    grid = learned(lkv)
    assert grid["lkv"] is lkv
    assert grid["uniform+lkv-t"].scorer is lkv.scorer and grid["lkv-h+kvzip"].budget is lkv.budget
    assert all(isinstance(grid[name], LKV) for name in ("uniform+lkv-t", "lkv-h+snapkv", "lkv-h+kvzip"))
