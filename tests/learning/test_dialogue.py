"""Passages as a chat model reads them, and as any other does."""

from __future__ import annotations

import pytest
from tiny_texts import tokenizer

from lkv.learn.dialogue import exchange
from lkv.tasks.facts import Fact
from lkv.tasks.passages import Passage

FACTS = (
    Fact("number", "The size is 41.", "What is the size?", "The size is", "41"),
    Fact("name", "The chief is Ada Novak.", "Who is the chief?", "The chief is", "Ada Novak"),
)
PASSAGE = Passage(
    "essays", "1.txt", "Once. The size is 41. The chief is Ada Novak. Then", FACTS, " it ended. And so on."
)


@pytest.mark.parametrize("chat", [True, False])
def test_a_passage_is_read_and_asked_about(chat: bool) -> None:
    """With a template, the question ends the message of the user; without, nothing marks a role."""
    reader = tokenizer(chat)
    talk = exchange(reader, PASSAGE, 9)

    def shown(tokens: list[int]) -> str:
        return reader.decode(tokens)

    before = "<s>user\n" if chat else "<s>"
    assert shown(talk.context) == before + PASSAGE.text
    assert shown(talk.context[: talk.protected]) == before
    ends = "</s>\n<s>assistant\n" if chat else "\nAnswer: "
    asks = "\n\n" if chat else "\n\nQuestion: "
    assert [shown(q) for q in talk.questions] == [f"{asks}{x.question}{ends}{x.lead}" for x in FACTS]
    assert [shown(x) for x in talk.answers] == [" 41.", " Ada Novak."]
    assert shown(talk.continuation) == " it ended"
    assert exchange(reader, PASSAGE, 0).continuation == []


def test_a_tokenizer_without_a_first_token_puts_none() -> None:
    reader = tokenizer(False)
    reader.bos_token = None
    talk = exchange(reader, PASSAGE, 4)
    assert talk.protected == 0 and reader.decode(talk.context) == PASSAGE.text
