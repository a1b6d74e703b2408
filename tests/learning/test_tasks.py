"""Tasks: the same everywhere, of the wanted length, with one right answer."""

from __future__ import annotations

import hashlib

import pytest

from lkv import tasks
from lkv.tasks import English, Words

ALL = list(tasks.TASKS)


def letters(text: str) -> int:
    """Tokens of four letters."""
    return len(text) // 4 + 1


# The first letters of the SHA-256 of context and question of sample 3, for `Words` and for `English`.
DIGESTS = {
    "single": ("413d3021741c", "5279df6bc379"),
    "multi_key": ("aede1e19bb9e", "8a1b94d9709b"),
    "multi_value": ("8700107ef645", "bcaca8d2ebfc"),
    "multi_query": ("2854321bb132", "6835f375ca4a"),
    "key_value": ("9010ca14a15e", "c97d0f30e9c7"),
    "variable_tracking": ("7bcf7b66a55a", "ba203739b619"),
    "common_words": ("a5bde1825f28", "4047f4d94148"),
    "frequent_words": ("86a297a80956", "58f7d40a9795"),
}


@pytest.mark.parametrize("task", ALL)
def test_the_same_numbers_give_the_same_sample(task: str) -> None:
    assert tasks.make(task, 5, 300) == tasks.make(task, 5, 300) == tasks.make(task, 5, 300, split="test")


@pytest.mark.parametrize("task", ALL)
def test_samples_of_long_ago(task: str) -> None:
    """Numbers in the docs are made from these samples: a change of the generator is to be noticed, on any machine."""
    results = []
    for language, length in ((Words(), 200), (English(), 900)):
        sample = tasks.make(task, 3, length, language=language, count=letters if length == 900 else tasks.words)
        results.append(hashlib.sha256(f"{sample.context}{sample.question}{sample.answer}".encode()).hexdigest()[:12])
    assert tuple(results) == DIGESTS[task]


def test_a_sample_of_long_ago() -> None:
    sample = tasks.make("multi_key", 0, 120)
    assert sample.context.split()[:6] == ["gone", "met", "Kara", "by", "37", "10"]
    assert (sample.question, sample.answer) == ("find Koti :", "20 10 . </s>")


@pytest.mark.parametrize("task", ALL)
def test_splits_and_numbers_share_nothing(task: str) -> None:
    """Not one text, and not one fact, of those that a model is trained on, chosen by and tested with."""
    texts, evidence, contents = set(), set(), 0
    for split in tasks.SPLITS:
        for index in range(30):
            sample = tasks.make(task, index, 150, split=split)
            texts.add(sample.context)
            evidence.add(sample.evidence or frozenset(sample.context.split()))
            contents += 1
            assert sample.context != tasks.make(task, index, 151, split=split).context[: len(sample.context)]
    assert len(texts) == len(evidence) == contents == 90


def test_tasks_of_a_number_share_no_facts() -> None:
    results = {task: tasks.make(task, 2, 200).evidence for task in tasks.RETRIEVAL}
    assert len(set().union(*results.values())) == sum(map(len, results.values()))


@pytest.mark.parametrize("task", [*tasks.RETRIEVAL[1:], "variable_tracking"])
def test_which_question_is_chosen_depends_on_all_that_names_a_sample(task: str) -> None:
    """Every question of a scene comes up, and not the same one in all splits or tasks of a number."""
    places = {
        split: [
            [q.text for q in tasks.scene(task, i, 150, split=split).questions].index(
                tasks.make(task, i, 150, split=split).question
            )
            for i in range(60)
        ]
        for split in tasks.SPLITS
    }
    count = len(tasks.scene(task, 0, 150).questions)
    assert all(set(found) == set(range(count)) for found in places.values())
    assert len({tuple(found) for found in places.values()}) == 3
    other = "multi_query" if task == "multi_key" else "multi_key"
    theirs = [
        [q.text for q in tasks.scene(other, i, 150).questions].index(tasks.make(other, i, 150).question)
        for i in range(60)
    ]
    assert theirs != places["test"]


@pytest.mark.parametrize("task", ALL)
def test_a_sample_is_one_question_of_its_scene(task: str) -> None:
    for split in tasks.SPLITS:
        scene, sample = (make(task, 7, 200, split=split) for make in (tasks.scene, tasks.make))
        assert (sample.task, sample.index, sample.context) == (task, 7, scene.context)
        assert (sample.question, sample.answer, sample.expected) in [
            (q.text, q.answer, q.expected) for q in scene.questions
        ]
        assert sample.evidence == scene.evidence
        assert sample.evidence_tokens == sum(len(sentence.split()) for sentence in scene.evidence)


def test_options_are_those_of_the_task() -> None:
    assert len(tasks.scene("multi_key", 0, 200, keys=3).questions) == 3
    assert len(tasks.make("multi_query", 0, 200, keys=5, asked=4).expected) == 4
    assert len(tasks.make("multi_value", 0, 200, keys=2, values=5).expected) == 5
    assert len(tasks.scene("key_value", 0, 200, names=2, attributes=4).questions) == 8
    assert len(tasks.make("variable_tracking", 0, 200, chains=1, hops=4).expected) == 5


@pytest.mark.parametrize("task", ALL)
def test_tokens_are_counted_by_the_given_function(task: str) -> None:
    """Where a word is two tokens, a text has half as many words."""
    sample = tasks.make(task, 0, 900, count=lambda text: 2 * tasks.words(text))
    assert tasks.words(sample.context) == 450
    assert sample.evidence_tokens == 2 * sum(map(tasks.words, sample.evidence))


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("length", [128, 1024])
def test_words_are_tokens_and_the_length_is_exact(task: str, length: int, words: Words) -> None:
    for index in range(5):
        sample = tasks.make(task, index, length)
        assert len(words.encode(sample.context)) == length
        assert words.encode(sample.question) and words.encode(sample.answer)
        assert all(expected in sample.answer for expected in sample.expected)


@pytest.mark.parametrize("task", ALL)
def test_english_keeps_to_the_length(task: str) -> None:
    sample = tasks.make(task, 1, 900, language=English(), count=letters)
    assert 0.7 * 900 < letters(sample.context) <= 900 * 1.02
    assert all(expected in sample.context for expected in sample.expected)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="expected one of single, multi_key"):
        tasks.make("needle", 0, 100)
    with pytest.raises(ValueError, match="expected a split of train"):
        tasks.make("single", 0, 100, split="dev")
    with pytest.raises(ValueError, match="expected a context of at least 48 tokens"):
        tasks.make("multi_key", 0, 20)
    assert tasks.make("multi_key", 0, 48).evidence_tokens == 48
