"""What training reads: its own split, chosen by seed, step and row alone, in the tokens of the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from lkv import tasks
from lkv.learn.config import TrainConfig
from lkv.learn.source import Examples, Source
from lkv.tasks import Language, Words
from lkv.text import encode

CONFIG = TrainConfig(tasks=("single", "multi_key", "key_value"), batch=4, questions=3, length=120)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, dict[str, object]]]:
    """Task, index and options of every scene that is made."""
    calls, made = [], tasks.scene

    def scene(task: str, index: int, length: int, **options: object) -> tasks.Scene:
        calls.append((task, index, dict(length=length, **options)))
        return made(task, index, length, **options)

    monkeypatch.setattr(tasks, "scene", scene)
    return calls


def read(
    tokenizer: PreTrainedTokenizerBase,
    step: int = 5,
    rows: Sequence[int] = range(4),
    language: Language | None = None,
    **changes: object,
) -> Examples:
    return Source(replace(CONFIG, **changes), tokenizer, language or Words()).examples(step, rows)


@pytest.mark.parametrize("step", [-1, 0, 7])
def test_training_reads_the_split_train_alone(tokenizer: PreTrainedTokenizerBase, seen: list, step: int) -> None:
    read(tokenizer, step)
    assert len(seen) == 4
    assert all(options["split"] == "train" and options["length"] == 120 for _, _, options in seen)
    assert all(isinstance(options["language"], Words) for _, _, options in seen)


def test_seed_step_and_row_make_another_text_each(tokenizer: PreTrainedTokenizerBase, seen: list) -> None:
    for seed in (0, 1):
        for step in (-2, 0, 1):
            read(tokenizer, step, seed=seed)
    indices = [index for _, index, _ in seen]
    assert len(set(indices)) == len(indices) == 24
    assert read(tokenizer) == read(tokenizer)


def test_a_row_is_the_same_whoever_reads_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """Parts of a step and processes read a row each on their own."""
    whole = read(tokenizer)
    for row in range(4):
        part = read(tokenizer, rows=[row])
        assert part.contexts == whole.contexts[row : row + 1]
        assert part.questions == whole.questions[3 * row : 3 * row + 3]
        assert part.answers == whole.answers[3 * row : 3 * row + 3]


def test_tasks_take_turns_over_rows_and_steps(tokenizer: PreTrainedTokenizerBase, seen: list) -> None:
    for step in range(3):
        read(tokenizer, step, range(5), batch=5)
    assert [task for task, _, _ in seen] == [CONFIG.tasks[i % 3] for i in range(15)]


def test_tokens_are_those_of_the_scene(tokenizer: PreTrainedTokenizerBase, seen: list) -> None:
    """The beginning token before a text and nowhere else; every question with its own answer."""
    examples = read(tokenizer)
    begin = tokenizer.bos_token_id
    for row, (task, index, options) in enumerate(list(seen)):
        scene = tasks.scene(task, index, **options)
        assert examples.contexts[row] == [begin, *encode(tokenizer, scene.context)]
        assert len(examples.contexts[row]) == 121
        answers = {tuple(encode(tokenizer, q.text)): encode(tokenizer, q.answer) for q in scene.questions}
        for question, answer in zip(examples.questions[3 * row :][:3], examples.answers[3 * row :][:3], strict=True):
            assert answers[tuple(question)] == answer and begin not in question
    assert len(examples.questions) == len(examples.answers) == 12


def test_questions_are_different_as_long_as_there_are_enough(tokenizer: PreTrainedTokenizerBase, seen: list) -> None:
    few, many = (read(tokenizer, tasks=("multi_key",), questions=n) for n in (3, 20))
    there = len(tasks.scene(*seen[0][:2], **seen[0][2]).questions)
    for examples, requests in ((few, 3), (many, 20)):
        assert len(examples.questions) == 4 * requests
        for row in range(4):
            mine = {tuple(q) for q in examples.questions[row * requests :][:requests]}
            assert len(mine) == min(requests, there)


def test_lengths_are_counted_in_tokens_of_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that makes two tokens of a word, and adds special ones unless an option forbids it."""

    class Halves:
        bos_token_id = 10**6

        def __call__(self, text: str, add_special_tokens: bool = True) -> object:
            ids = [i for i in tokenizer(text, add_special_tokens=False).input_ids for _ in range(2)]
            return type("Encoding", (), dict(input_ids=[10**6, *ids, 10**6] if add_special_tokens else ids))

    source = Source(replace(CONFIG, length=300), Halves(), Words())
    assert source.count("set Bala to 41 87 .") == 12
    for context in source.examples(0, range(4)).contexts:
        assert context[0] == 10**6 and 10**6 not in context[1:]
        assert 270 <= len(context) - 1 <= 300


def test_the_global_random_state_is_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    random.seed(3)
    before = random.getstate()
    read(tokenizer)
    assert random.getstate() == before
