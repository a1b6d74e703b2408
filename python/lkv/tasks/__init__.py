"""Long-context tasks, made from a seed at any length.

    sample = lkv.tasks.make("multi_key", index=7, length=1024)

The same split, index, length and language give the same sample on every machine. Whatever was trained on the split
"train" may be tested on "test", and chosen on "validation".
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lkv.tasks.english import English
from lkv.tasks.language import Language
from lkv.tasks.reasoning import common_words, frequent_words, variable_tracking
from lkv.tasks.retrieval import key_value, multi_key, multi_query, multi_value, single
from lkv.tasks.scene import Count, Question, Sample, Scene
from lkv.tasks.words import Words

__all__ = [
    "REASONING",
    "RETRIEVAL",
    "SPLITS",
    "TASKS",
    "English",
    "Language",
    "Question",
    "Sample",
    "Scene",
    "Words",
    "make",
    "scene",
]

RETRIEVAL = ("single", "multi_key", "multi_value", "multi_query", "key_value")
REASONING = ("variable_tracking", "common_words", "frequent_words")
SPLITS = ("train", "validation", "test")
TASKS: dict[str, Callable[..., Scene]] = {
    "single": single,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "key_value": key_value,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
}


def words(text: str) -> int:
    """Tokens of a text in the language of `Words`."""
    return text.count(" ") + 1


def scene(
    task: str,
    index: int,
    length: int,
    *,
    split: str = "test",
    language: Language | None = None,
    count: Count = words,
    **options: int,
) -> Scene:
    """The text of one sample with all its questions; see `make`."""
    if task not in TASKS:
        raise ValueError(f"lkv.tasks: expected one of {', '.join(TASKS)}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"lkv.tasks: expected a split of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"{task}/{split}/{index}/{length}")
    return TASKS[task](rng, language or Words(), length, count, **options)


def make(
    task: str,
    index: int,
    length: int,
    *,
    split: str = "test",
    language: Language | None = None,
    count: Count = words,
    **options: int,
) -> Sample:
    """One question about one text.

    Args:
        task: one of `TASKS`.
        index: number of the sample within its split.
        length: tokens of the context; with `Words` exactly, else at most and by a few.
        split: "train", "validation" or "test".
        language: default `Words`.
        count: tokens of a text, where the language is read by another tokenizer than that of `Words`.
        options: numbers of keys and so on, as the task's function has them.

    Raises:
        ValueError: for an unknown task or split, and a length that the facts do not fit in.
    """
    made = scene(task, index, length, split=split, language=language, count=count, **options)
    question = random.Random(f"{task}/{split}/{index}/question").choice(made.questions)
    evidence = sum(map(count, made.evidence))
    texts = (question.text, question.answer, question.expected)
    return Sample(task, index, made.context, *texts, made.evidence, evidence)
