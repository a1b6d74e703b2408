"""What a synthetic task is made of: a text, all questions about it, and where the answers stand."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Count = Callable[[str], int]  # tokens of a text


@dataclass(frozen=True, slots=True)
class Question:
    """Asked after the text.

    Attributes:
        text: up to the place where the answer begins.
        answer: as a model should write it.
        expected: what has to be found in what it writes, every one of them counted by itself.
    """

    text: str
    answer: str
    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A text and its questions.

    Attributes:
        context: the text.
        questions: all possible ones. A method that does not see the question has to keep the answers to all.
        evidence: the sentences that hold the answers.
    """

    context: str
    questions: tuple[Question, ...]
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one text.

    Attributes:
        task: its name. index: its number within a split: the same numbers give the same sample everywhere.
        evidence: the sentences that some question of the scene needs. evidence_tokens: of all of them.
    """

    task: str
    index: int
    context: str
    question: str
    answer: str
    expected: tuple[str, ...]
    evidence: tuple[str, ...]
    evidence_tokens: int


def weave(rng: random.Random, sentences: Sequence[str], filler: Callable[[], str], length: int, count: Count) -> str:
    """The sentences, in their order, at random places between filler, `length` tokens or a little less together.

    Raises:
        ValueError: where the sentences alone are longer.
    """
    space = length - sum(map(count, sentences))
    if space < 0:
        raise ValueError(
            f"lkv.tasks: expected a context of at least {length - space} tokens, which its sentences need, got {length}"
        )
    hay: list[str] = []
    while space > 0:
        straw = filler()
        space -= count(straw)
        if space >= 0:
            hay.append(straw)
    places = sorted(rng.randrange(len(hay) + 1) for _ in sentences)
    text: list[str] = []
    begin = 0
    for place, sentence in zip(places, sentences, strict=True):
        text += hay[begin:place]
        text.append(sentence)
        begin = place
    return " ".join(text + hay[begin:])
