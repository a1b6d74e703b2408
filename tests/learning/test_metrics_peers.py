"""Metrics of LongBench against the packages that its own script scores with, and against a longhand edit distance."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rapidfuzz")

from lkv.evaluate import metrics

LETTERS = st.text("abc (_=", max_size=8)


def common(a: str, b: str) -> int:
    """Letters of a longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
        row = new
    return row[-1]


@settings(max_examples=80)
@given(LETTERS, LETTERS)
def test_similarity_of_code_is_twice_what_is_common_over_both(text: str, expected: str) -> None:
    percent = 100 * metrics.code_similarity(text, expected)
    wanted = 200 * common(text, expected) / (len(text) + len(expected)) if text and expected else 0
    assert percent == pytest.approx(round(percent)) and abs(percent - wanted) <= 0.5 + 1e-9


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True),
    st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True),
)
def test_rouge_l_of_a_sentence_is_that_of_the_package_rouge(text: list[str], expected: list[str]) -> None:
    """Exact where every word stands once: then all longest subsequences have as many words."""
    rouge = pytest.importorskip("rouge")
    wanted = rouge.Rouge(metrics=["rouge-l"]).get_scores(" ".join(text), " ".join(expected))[0]["rouge-l"]["f"]
    assert metrics.rouge_l(" ".join(text), " ".join(expected)) == pytest.approx(wanted, abs=1e-7)


def test_rouge_l_of_texts_is_near_that_of_the_package_rouge() -> None:
    """Which of several longest subsequences is taken is left to the implementation."""
    rouge = pytest.importorskip("rouge")
    rng = random.Random(0)
    words = [f"w{i}" for i in range(60)]
    weights = [1 / (i + 1) for i in range(60)]

    def text() -> str:
        return ". ".join(" ".join(rng.choices(words, weights, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 5)))

    pairs = [(text(), text()) for _ in range(100)]
    theirs = [
        s["rouge-l"]["f"] for s in rouge.Rouge(metrics=["rouge-l"]).get_scores(*map(list, zip(*pairs, strict=True)))
    ]
    ours = [metrics.rouge_l(*pair) for pair in pairs]
    assert sum(theirs) / 100 > 0.3
    assert sum(ours) / 100 == pytest.approx(sum(theirs) / 100, abs=0.01)
    assert sum(abs(a - b) < 1e-6 for a, b in zip(ours, theirs, strict=True)) > 60
