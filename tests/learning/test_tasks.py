"""Tasks: the same everywhere, of the length asked for, with one right answer."""

from __future__ import annotations

import random

import pytest

from lkv import tasks
from lkv.tasks import English, Words
from lkv.tasks.scene import weave

ALL = list(tasks.TASKS)


@pytest.mark.parametrize("task", ALL)
def test_the_same_numbers_give_the_same_sample(task: str) -> None:
    first = tasks.make(task, 5, 300)
    assert first == tasks.make(task, 5, 300)
    others = [tasks.make(task, 6, 300), tasks.make(task, 5, 300, split="train"), tasks.make(task, 5, 310)]
    assert all(first.context != other.context for other in others)


def test_a_sample_of_long_ago() -> None:
    """Numbers in the docs are made from these samples: a change of the generator is to be noticed."""
    sample = tasks.make("multi_key", 0, 120)
    assert sample.context.split()[:6] == ["gone", "met", "Kara", "by", "37", "10"]
    assert (sample.question, sample.answer) == ("find Koti :", "20 10 . </s>")


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("length", [128, 1024])
def test_words_are_tokens_and_the_length_is_exact(task: str, length: int, words: Words) -> None:
    for index in range(5):
        sample = tasks.make(task, index, length)
        assert len(words.encode(sample.context)) == length
        assert words.encode(sample.question) and words.encode(sample.answer)
        assert all(expected in sample.answer for expected in sample.expected)


@pytest.mark.parametrize("task", tasks.RETRIEVAL)
def test_answers_stand_in_the_evidence_and_nowhere_else(task: str) -> None:
    for index in range(10):
        sample = tasks.make(task, index, 512)
        without = sample.context
        for sentence in sample.evidence:
            assert sentence in without
            without = without.replace(sentence, "")
        assert all(expected not in without for expected in sample.expected)
        assert sample.evidence_tokens <= 0.15 * 1024 / 2


@pytest.mark.parametrize("task", tasks.RETRIEVAL)
def test_decoys_look_like_answers(task: str) -> None:
    """Keys of the question occur outside of the evidence as well, and there are more decoys than 15 % has room for."""
    outside = 0
    for index in range(10):
        scene = tasks.scene(task, index, 1024)
        rest = scene.context
        for sentence in scene.evidence:
            rest = rest.replace(sentence, "")
        key = scene.questions[0].text.split()[1]
        outside += key in rest.split()
        assert sum(word.isdigit() for word in rest.split()) > 0.1 * 1024
    assert outside >= 7


def test_variables_follow_their_chain() -> None:
    scene = tasks.scene("variable_tracking", 3, 400)
    given = {s.split()[1]: " ".join(s.split()[3:-1]) for s in scene.evidence}  # let NAME be VALUE .
    for question in scene.questions:
        value = " ".join(question.text.split()[1:-1])
        for name in question.expected:
            while name in given:
                name = given[name]
            assert name == value


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
def test_counted_words_are_the_most_frequent(task: str) -> None:
    scene = tasks.scene(task, 2, 600)
    words = scene.context.split()
    counts = sorted({word: words.count(word) for word in words}.items(), key=lambda item: -item[1])
    assert {word for word, _ in counts[:3]} == set(scene.questions[0].expected)
    assert counts[2][1] > counts[3][1]


@pytest.mark.parametrize("task", ALL)
def test_english_keeps_to_the_length(task: str) -> None:
    def count(text: str) -> int:
        return len(text) // 4 + 1

    sample = tasks.make(task, 1, 900, language=English(), count=count)
    assert 0.7 * 900 < count(sample.context) <= 900 * 1.02
    assert all(expected in sample.context for expected in sample.expected)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="expected one of single, multi_key"):
        tasks.make("needle", 0, 100)
    with pytest.raises(ValueError, match="expected a split of train"):
        tasks.make("single", 0, 100, split="dev")
    with pytest.raises(ValueError, match="expected a context of at least 48 tokens"):
        tasks.make("multi_key", 0, 20)
    with pytest.raises(ValueError, match="at least 7 tokens"):
        weave(random.Random(0), ["a b c d e f g"], lambda: "x", 6, lambda text: len(text.split()))
