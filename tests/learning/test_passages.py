"""Passages of files: as long as asked, facts between sentences, and what comes behind them in the file."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import pytest
from tiny_texts import code, files, prose

from lkv import tasks
from lkv.tasks.documents import Document, documents
from lkv.tasks.facts import TRAINED, UNSEEN
from lkv.tasks.passages import Passage, passage, pieces_of, synthetic


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    return documents(files(tmp_path_factory.mktemp("texts")))


def make(found: list[Document], index: int = 0, length: int = 900, split: str = "train", **more: object) -> Passage:
    return passage(found, index, length, len, split=split, **more)


def without_facts(made: Passage) -> str:
    text = made.text
    for fact in made.facts:
        assert text.count(fact.statement) == 1
        before, _, after = text.partition(fact.statement)
        assert before[-1] in " \n"
        text = before[:-1] + after
    return text


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("length", [600, 1500])
def test_a_passage_is_part_of_a_file_of_its_split(found: list[Document], split: str, length: int) -> None:
    """With the statements taken out, letter by letter; domains take turns."""
    by_name = {(x.domain, x.name): x for x in found}
    for index in range(8):
        made = make(found, index, length, split, continuation=30)
        document = by_name[made.domain, made.document]
        assert document.split == split and made.domain == ("essays", "sources")[index % 2]
        assert length - 30 < len(made.text) <= length and len(made.facts) == 4
        text = without_facts(made)
        assert text + made.continuation in document.text
        assert len(made.continuation) > 30


def test_the_same_arguments_give_the_same_passage_and_others_another(found: list[Document]) -> None:
    made = make(found, 4)
    assert made == make(found, 4)
    others = [make(found, 6), make(found, 4, seed=1), make(found, 4, split="test"), make(found, 4, length=960)]
    assert all(other.text != made.text for other in others)
    texts = {make(found, i).text for i in range(20)}
    assert len(texts) == 20


def test_passages_are_the_same_everywhere() -> None:
    """Those that published numbers are of: whatever is cut, woven in or drawn in another way gives others."""
    rng, digest = random.Random(2), hashlib.sha256()
    texts = [prose(rng, n) for n in (20, 60, 200)] + [code(rng, 40), "x" * 900 + " word" * 300]
    found = [Document("one", str(i), text, str(i), "train") for i, text in enumerate(texts)]
    for index, space in enumerate((300, 500, 800, 1000) * 6):
        made = passage(found, index, space, len, split="train", facts=1 + index % 3, continuation=index)
        digest.update(repr(made).encode())
    made = synthetic("single", 3, 900, len, split="train")
    digest.update(repr(made).encode())
    assert 800 < len(made.text) <= 900
    assert digest.hexdigest() == "ee287d33f59faa9f1aed435fb1dd00e7b5024a322b04908c4b5ea2b1d100d29c"


def test_statements_stand_where_a_sentence_has_ended(found: list[Document]) -> None:
    """In prose behind a full stop or before an empty line; in a source on a line of their own."""
    for index in range(12):
        made = make(found, index)
        for fact in made.facts:
            before, _, after = made.text.partition(fact.statement)
            if made.domain == "sources":
                assert before[-1] == "\n" and after[0] == "\n"
            assert before.rstrip()[-1] in ".:])" and after[0] in " \n"
        places = [made.text.index(x.statement) for x in made.facts]
        assert places == sorted(places)


def test_wordings_are_those_that_were_asked_for(found: list[Document]) -> None:
    for wordings in (TRAINED, UNSEEN):
        made = [make(found, i, facts=6, length=1500, wordings=wordings) for i in range(6)]
        questions = [fact.question for each in made for fact in each.facts]
        heads = [x.question.partition("{key}") for x in wordings]
        assert all(any(q.startswith(a) and q.endswith(b) for a, _, b in heads) for q in questions)
    assert make(found, 0).facts != make(found, 0, wordings=UNSEEN).facts


@pytest.mark.parametrize("text", ["", "One. Two! three. Four?\n\nFive\n  six: seven:\n    eight)\nnine", "x" * 1000])
def test_pieces_are_the_text(text: str) -> None:
    pieces = pieces_of(text)
    assert "".join(pieces) == text and all(pieces) and max(map(len, pieces), default=0) <= 400


def test_ends_of_pieces() -> None:
    text = 'He said "no." Then (so) he left, e.g. at 5. \n\nA list:\n  one\nx = f(a)\ny = 2'
    first = 'He said "no." Then (so) he left, e.g. at 5.'
    assert pieces_of(text) == [first, " ", "\n\nA list:", "\n  one\nx = f(a)", "\ny = 2"]


def test_texts_that_are_too_short(found: list[Document]) -> None:
    short = [replace(x, text=x.text[:500]) for x in found]
    with pytest.raises(ValueError, match=r"a file of more than \d+ tokens in the split 'train' of the domain 'essays'"):
        make(short, 0)
    with pytest.raises(ValueError, match="expected documents of the split 'other', got none"):
        make(found, 0, split="other")
    with pytest.raises(ValueError, match=r"expected passages of more than \d+ tokens, which their facts need"):
        make(found, 0, length=60)
    # Just long enough, wherever it begins: from the beginning.
    text = prose(random.Random(3), 30)
    one = [Document("one", "a", text, "d", "train")]
    space = len(text) - 80
    for index in range(6):
        made = passage(one, index, space, len, split="train", facts=1, continuation=20)
        assert without_facts(made) + made.continuation in text


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_synthetic_passage_asks_what_its_task_asks(task: str) -> None:
    def words(text: str) -> int:
        return len(text.split())

    made = synthetic(task, 3, 300, words, split="train", questions=5)
    scene = tasks.scene(task, 3, 300, split="train", language=tasks.English(), count=words)
    assert made == synthetic(task, 3, 300, words, split="train", questions=5)
    assert made.text == scene.context and made.continuation == "" and 250 < words(made.text) <= 300
    assert (made.domain, made.document) == ("synthetic", f"{task}/3")
    asked = {(" ".join([fact.question, fact.lead]), f" {fact.value}.") for fact in made.facts}
    assert len(made.facts) == min(5, len(scene.questions))
    assert asked <= {(question.text.strip(), question.answer) for question in scene.questions}
    assert all(fact.question.endswith("?") and fact.lead and fact.kind == task for fact in made.facts)
    others = [synthetic(task, 4, 300, words, split="train"), synthetic(task, 3, 300, words, split="test")]
    assert all(other.text != made.text for other in others)
