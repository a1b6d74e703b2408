"""Settings of the plug-in for vLLM, and the rows that follow from them on both sides of an engine."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from lkv.vllm.settings import OFF, Settings, dropped, dropped_rows, from_environment, request_retention

PLAIN = {"policy": "knorm", "retention": 0.5}


def test_nothing_set_is_no_eviction() -> None:
    assert Settings.of({}) is None and Settings.of({"other": 1}) is None and Settings.of(object()) is None


def test_all_that_can_be_set() -> None:
    given = {**PLAIN, "counts": "head", "min_prompt": 7, "sink": 1, "window": 2, "shares": [[1, 2], [0.5, 0.5]]}
    found = Settings.of({"lkv": given})
    assert found == Settings("knorm", 0.5, "head", 7, 1, 2, ((1.0, 2.0), (0.5, 0.5)))
    assert hash(found) is not None  # a part of what vLLM compares


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("knorm", "expected additional_config['lkv'] to be an object"),
        ({"policy": "knorm"}, "expected retention among the settings"),
        ({**PLAIN, "rate": 1}, "expected settings of policy, retention, counts"),
        ({**PLAIN, "policy": ""}, "expected policy to be a name or a folder"),
        *[({**PLAIN, "retention": value}, "expected retention in (0, 1]") for value in (0, 1.1, True, "all")],
        ({**PLAIN, "counts": "heads"}, "expected counts of equal, layer, head"),
        *[({**PLAIN, name: -1}, f"expected {name} >= 0") for name in ("min_prompt", "sink", "window")],
        ({**PLAIN, "min_prompt": None}, "expected min_prompt >= 0"),
        ({**PLAIN, "sink": True}, "expected sink >= 0"),
        ({**PLAIN, "shares": [[1.0]]}, "expected counts 'layer' or 'head' with shares"),
        *[
            ({**PLAIN, "counts": "head", "shares": value}, "expected shares to be a list of positive numbers")
            for value in (1.0, [1.0], [[]], [[0]], [["1"]])
        ],
    ],
)
def test_what_cannot_be_set(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^lkv.vllm: {re.escape(words)}"):
        Settings.of({"lkv": given})


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LKV_VLLM", raising=False)
    assert from_environment() is None
    monkeypatch.setenv("LKV_VLLM", '{"policy": "knorm", "retention": 0.5}')
    assert from_environment() == PLAIN
    for text in ("{", "[1]"):
        monkeypatch.setenv("LKV_VLLM", text)
        with pytest.raises(ValueError, match="expected an object in JSON in LKV_VLLM"):
            from_environment()


def test_requests() -> None:
    assert request_retention(None) is None and request_retention({"other": 1}) is None
    assert request_retention({"lkv": False}) == OFF
    assert request_retention({"lkv": {"retention": 0.3}}) == 0.3
    for own in (
        True,
        "off",
        {},
        {"retention": 0},
        {"retention": 1.5},
        {"retention": True},
        {"retention": 0.3, "sink": 1},
    ):
        with pytest.raises(ValueError, match="expected extra_args"):
            request_retention({"lkv": own})


def test_short_prompts_are_not_evicted() -> None:
    settings = Settings("knorm", 0.5, min_prompt=100)
    assert settings.effective(99, {"lkv": {"retention": 0.3}}) == OFF
    assert settings.effective(100, {"lkv": {"retention": 0.3}}) == 0.3
    assert settings.effective(100, {"lkv": False}) == OFF
    assert settings.effective(100, None) == 0.5


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("fraction", [0.001, 0.15, 1 / 3, 0.5, 0.99, 1.0, 1.5])
def test_whole_blocks_go_and_less_than_one_more_stays(fraction: float, block: int) -> None:
    before = 0
    for prompt in range(1, 700):
        drop = dropped(prompt, fraction, block)
        kept = max(1, min(fraction, 1) * prompt)
        assert drop % block == 0 and kept <= prompt - drop < kept + block + 1
        assert drop >= before  # a longer prompt frees no less, so that hits of a shorter one are within it
        before = drop


def test_many_heads_at_once_are_as_each_alone() -> None:
    """Workers compute these for a batch, the scheduler for a request: they must agree wherever rounding falls."""
    prompts = np.array([*range(400), 2047, 4096, 131072])
    retentions, shares = np.array([0.05, 0.1, 0.15, 0.3, 1 / 3, 0.7, 0.999]), np.array([1, 1 / 64, 33 / 64, 2.5, 20])
    for block in (16, 48, 128):
        found = dropped_rows(prompts[:, None, None], shares * retentions[:, None], block)
        each = [
            [[dropped(int(n), float(s) * float(r), block) if n else 0 for s in shares] for r in retentions]
            for n in prompts
        ]
        assert np.array_equal(np.where(prompts[:, None, None] > 0, found, 0), each)
