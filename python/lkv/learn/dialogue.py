"""Passages as tokens, in the model's chat template if it has one: what is read, the questions, how answers begin."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lkv.tasks.passages import Passage
from lkv.text import ask, encode, opening


@dataclass(frozen=True)
class Exchange:
    """
    Attributes:
        context: what is read, and evicted. protected: how many tokens at its beginning are not of the passage.
        questions: up to where each answer begins. answers: the right ones.
        continuation: the tokens that follow the passage.
    """

    context: list[int]
    protected: int
    questions: list[list[int]]
    answers: list[list[int]]
    continuation: list[int]


def exchange(tokenizer: PreTrainedTokenizerBase, passage: Passage, continuation: int) -> Exchange:
    """The user gives the passage and asks about it; the first words of the answer are given.

    A tokenizer without a chat template reads the bare passage, begun as the model's texts begin.

    Args:
        continuation: tokens of it, at most.
    """
    before = opening(tokenizer)
    context = [*before, *encode(tokenizer, passage.text)]
    questions, answers = [], []
    for fact in passage.facts:
        questions.append(ask(tokenizer, fact.question, fact.lead))
        answers.append(encode(tokenizer, f" {fact.value}."))
    return Exchange(context, len(before), questions, answers, encode(tokenizer, passage.continuation)[:continuation])
