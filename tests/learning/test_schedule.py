"""What changes from step to step: temperature, hardness, learning rates and retention, at the joints of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lkv.learn.config import TrainConfig
from lkv.learn.source import Source
from lkv.policies.lkv.checkpoint import Design

CONFIG = TrainConfig(steps=100, hard=0.3, temperature=(1.5, 0.05), retention=(0.05, 0.5))


def test_defaults_are_those_of_the_docs() -> None:
    config, design = TrainConfig(), Design()
    assert (config.temperature, config.hard, config.retention) == ((1.0, 0.05), 0.3, (0.05, 0.5))
    assert (config.steps, config.warm_steps, config.batch, config.accumulate, config.questions) == (600, 150, 8, 1, 4)
    assert (config.length, config.longest, config.answer_tokens, config.facts, config.continuation) == (
        1024,
        0,
        24,
        4,
        48,
    )
    assert (config.lr_budget, config.lr_scorer, config.kvzip_weight, config.synthetic) == (2e-2, 2e-3, 1.0, 0.0)
    assert (config.validate_every, config.validation, config.validation_retentions) == (100, 16, (0.05, 0.15))
    assert (config.target, config.start, config.replies, config.texts, config.seed) == (
        "kvzip",
        "flat",
        "right",
        200,
        0,
    )
    assert (design.sink, design.window, design.budget, design.input) == (4, 8, "capped", "kv")


def test_temperature_at_the_joints() -> None:
    """First at step 0, half way in the middle, almost the last in the last soft step, and the last one behind it."""
    assert CONFIG.soft_steps == 70
    assert CONFIG.temperature_at(0) == 1.5
    assert CONFIG.temperature_at(35) == pytest.approx((1.5 + 0.05) / 2)
    last_soft = 0.05 + 1.45 * 0.5 * (1 + math.cos(math.pi * 69 / 70))
    assert CONFIG.temperature_at(69) == pytest.approx(last_soft) and last_soft > 0.05
    assert CONFIG.temperature_at(70) == CONFIG.temperature_at(99) == 0.05
    quarter = 0.05 + 1.45 * (2 + math.sqrt(2)) / 4
    assert replace(CONFIG, steps=40, hard=0.0).temperature_at(10) == pytest.approx(quarter)


@settings(max_examples=30)
@given(
    steps=st.integers(1, 300),
    hard=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.999, 1.0]),
    ends=st.tuples(st.floats(0.01, 2), st.floats(0.01, 2)),
)
def test_temperature_never_turns_back_and_is_the_last_one_wherever_it_is_hard(steps, hard, ends) -> None:
    config = replace(CONFIG, steps=steps, hard=hard, temperature=ends)
    assert config.soft_steps == round(steps * (1 - hard))
    values = [config.temperature_at(step) for step in range(steps)]
    assert values[0] == pytest.approx(ends[0] if config.soft_steps else ends[1])
    assert all(value == ends[1] for value in values[config.soft_steps :])
    sign = 1 if ends[0] >= ends[1] else -1
    assert all(sign * (a - b) >= -1e-12 for a, b in pairwise(values))


def test_learning_rates_at_the_joints() -> None:
    """Up to the peak over the first 5 % of the steps, then a cosine towards 5 % of it."""
    for steps in (100, 400):
        rise = steps // 20
        cosine = [0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
        rates = [CONFIG.rate_at(step, steps) for step in range(steps)]
        assert rates[0] == pytest.approx(1 / rise)
        assert rates[rise - 2] == pytest.approx((rise - 1) / rise * cosine[rise - 2])
        assert rates[rise - 1 :] == pytest.approx(cosine[rise - 1 :])
        assert rates[steps // 2] == pytest.approx(0.525)
        assert 0.05 < rates[-1] < 0.06
    assert CONFIG.rate_at(0, 1) == CONFIG.rate_at(0, 19) == 1.0  # too few steps to rise


def test_retentions_are_even_in_their_logarithm_and_depend_on_seed_and_step() -> None:
    def drawn(**changes: object) -> list[float]:
        source = Source(replace(CONFIG, **changes), None, None)
        return [source.retention(step) for step in range(2000)]

    low, high = CONFIG.retention
    values = drawn()
    assert values == drawn() and values != drawn(seed=1) and len(set(values)) == 2000
    assert low <= min(values) < 1.01 * low and 0.99 * high < max(values) <= high
    below = sum(value < math.sqrt(low * high) for value in values)
    assert 900 < below < 1100  # as many below the geometric mean as above it
    assert set(drawn(retention=(0.3, 0.3))) == {0.3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(retention=(0.0, 0.5)), r"retention 0 < low <= high <= 1, got \(0.0, 0.5\)"),
        (dict(retention=(0.5, 0.4)), r"retention 0 < low <= high <= 1"),
        (dict(retention=(0.5, 1.1)), r"retention 0 < low <= high <= 1"),
        (dict(temperature=(1.0, 0.0)), "temperatures above 0"),
        (dict(temperature=(0.0, 1.0)), "temperatures above 0"),
        (dict(hard=-0.1), r"hard in \[0, 1\]"),
        (dict(hard=1.1), r"hard in \[0, 1\]"),
        (dict(length=12), "a length above the 12 protected tokens, got 12"),
        (dict(length=3, design=Design(sink=2, window=1)), "a length above the 3 protected tokens, got 3"),
        (dict(tasks=("needle",)), "tasks of single"),
        (dict(tasks=()), "tasks of single.* got none"),
        (dict(batch=3, accumulate=2), "a batch that accumulate divides"),
        (dict(warm_steps=-1), "warm_steps >= 0"),
        (dict(target="queries"), "a target of attention, kvzip, both, got 'queries'"),
        (dict(start="best"), "a start of flat, joint, got 'best'"),
        (dict(continuation=-1), "continuation >= 0, got -1"),
        *(
            ({name: 0}, f"{name} >= 1, got 0")
            for name in ("steps", "batch", "accumulate", "questions", "length", "answer_tokens", "validate_every")
            + ("texts", "facts")
        ),
    ],
    ids=str,
)
def test_wrong_configurations(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^lkv train: expected {message}"):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "changes", [dict(retention=(1.0, 1.0)), dict(hard=1.0), dict(length=13), dict(warm_steps=0), dict(continuation=0)]
)
def test_what_is_just_allowed(changes: dict[str, object]) -> None:
    replace(CONFIG, **changes)


@pytest.mark.parametrize("changes", [dict(sink=-1), dict(window=-1), dict(hidden=0), dict(sink=1.5), dict(window="4")])
def test_wrong_designs(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^lkv train: expected {next(iter(changes))} >= \d, a whole number, got"):
        Design(**changes)


def test_lengths_of_passages_are_even_in_their_logarithm() -> None:
    """Of a seed and a number alone; those of validation are the shortest ones."""
    config = replace(CONFIG, length=1000, longest=4000)
    drawn = [config.length_of("train", i) for i in range(2000)]
    assert drawn == [replace(config, steps=7).length_of("train", i) for i in range(2000)]
    assert drawn != [replace(config, seed=1).length_of("train", i) for i in range(2000)]
    assert min(drawn) >= 1000 and max(drawn) <= 4000 and all(isinstance(x, int) for x in drawn)
    assert sum(x < 2000 for x in drawn) / 2000 == pytest.approx(0.5, abs=0.05)
    assert {config.length_of("validation", i) for i in range(20)} == {1000}
    assert {replace(config, longest=0).length_of("train", i) for i in range(20)} == {1000}


def test_replies_are_of_two_kinds() -> None:
    with pytest.raises(ValueError, match="replies of right, own, got 'both'"):
        replace(CONFIG, replies="both")


def test_the_longest_passage_is_as_long_as_the_shortest_or_longer() -> None:
    with pytest.raises(ValueError, match="longest 0 or >= length, got 999"):
        replace(CONFIG, length=1000, longest=999)
