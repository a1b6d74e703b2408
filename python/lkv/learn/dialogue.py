"""Passages as tokens, in the model's chat template if it has one: what is read, the questions, how answers begin."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lkv.tasks.passages import Passage
from lkv.text import chat_frame, encode


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
    before, after = chat_frame(tokenizer)
    if before or after:
        context = [*before, *encode(tokenizer, passage.text)]
    else:
        context = encode(tokenizer, passage.text, begins=True)
    begin = len(context) - len(encode(tokenizer, passage.text))
    questions, answers = [], []
    for fact in passage.facts:
        if after:
            prompt = [*encode(tokenizer, f"\n\n{fact.question}"), *after, *encode(tokenizer, fact.lead)]
        else:
            prompt = encode(tokenizer, f"\n\nQuestion: {fact.question}\nAnswer: {fact.lead}")
        questions.append(prompt)
        answers.append(encode(tokenizer, f" {fact.value}."))
    return Exchange(context, begin, questions, answers, encode(tokenizer, passage.continuation)[:continuation])


def check_known(tokenizer: PreTrainedTokenizerBase, talk: Exchange, document: str, command: str) -> None:
    """
    Raises:
        ValueError: for a text of which the tokenizer does not know a tenth or more.
    """
    unknown = talk.context.count(tokenizer.unk_token_id) / len(talk.context)
    if unknown >= 0.1:
        raise ValueError(
            f"{command}: expected texts that the tokenizer of the model knows, got {document}, of which it "
            f"does not know {unknown:.0%}: is --model the one that was meant?"
        )
