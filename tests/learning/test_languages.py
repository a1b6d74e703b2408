"""The languages of tasks: every sentence means what it should, no word is part of another, and values are as drawn."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from lkv import tasks
from lkv.tasks import English, Words
from lkv.tasks.english import ADJECTIVES, ATTRIBUTES, NOUNS

ENGLISH, WORDS = English(), Words()


@pytest.mark.parametrize("language", [ENGLISH, WORDS], ids=lambda x: type(x).__name__)
def test_draws_are_distinct(language: tasks.Language) -> None:
    rng = random.Random(0)
    for count in (1, 12):
        assert len(set(language.attributes(rng, count))) == count
    for count in (1, 8, 100):
        assert len(set(language.names(rng, count))) == len(set(language.values(rng, count))) == count


def test_no_name_is_found_in_another() -> None:
    """Answers are looked for as strings."""
    for words in (Words.NAMES, Words.NUMBERS, Words.ATTRIBUTES, Words.FILLER):
        assert len({len(word) for word in words}) == 1 and len(set(words)) == len(words)
    assert (len(Words.NAMES), len(Words.NUMBERS), len(Words.FILLER)) == (128, 100, 240)
    assert len(WORDS.vocabulary) == 499
    assert not [(a, b) for a in ADJECTIVES for b in ADJECTIVES if a != b and b.endswith(a)]
    assert not [(a, b) for a in NOUNS for b in NOUNS if a != b and b.startswith(a)]


def test_english_names_are_all_pairs() -> None:
    names = ENGLISH.names(random.Random(1), len(ADJECTIVES) * len(NOUNS))
    assert set(names) == {f"{a}-{n}" for a in ADJECTIVES for n in NOUNS}
    assert all(re.fullmatch(r"[1-9]\d{6}", value) for value in ENGLISH.values(random.Random(2), 5000))
    assert set(ENGLISH.attributes(random.Random(0), len(ATTRIBUTES))) == set(ATTRIBUTES)


def test_values_in_words_are_two_numbers() -> None:
    drawn = WORDS.values(random.Random(0), 10_000)
    assert sorted(drawn) == [f"{a:02} {b:02}" for a in range(100) for b in range(100)]


def test_english_sentences() -> None:
    assert ENGLISH.fact("old-cat", "123") == "The special number of old-cat is 123."
    assert ENGLISH.key("old-cat", "age") == "the age of old-cat"
    assert ENGLISH.assign("old-cat", "123") == "VAR old-cat = 123."
    assert ENGLISH.ask(["a-b"], False) == (
        "\nWhat is the special number of a-b in this text? The special number of a-b is"
    )
    assert ENGLISH.ask(["a-b", "c-d"], False) == (
        "\nWhat are the special numbers of a-b, c-d in this text? The special numbers of a-b, c-d are"
    )
    assert ENGLISH.ask(["a-b"], True) == (
        "\nWhat are all the special numbers of a-b in this text? All special numbers of a-b are"
    )
    assert ENGLISH.tell(["a-b"], ["1"]) == " 1." and ENGLISH.tell(["a-b", "c-d"], ["2", "1"]) == " 2, 1."
    assert ENGLISH.listing(["b", "a"]) == " b, a."
    assert ENGLISH.ask_variables("7") == (
        "\nWhich variables have the value 7 in this text? The variables with the value 7 are"
    )
    assert ENGLISH.ask_words(3) == ("\nWhich 3 words are the most frequent in this text? The 3 most frequent words are")


def test_sentences_in_words() -> None:
    assert WORDS.fact("Bala", "41 87") == "set Bala to 41 87 ."
    assert WORDS.key("Bala", "age") == "Bala age"
    assert WORDS.assign("Bala", "Kiri") == "let Bala be Kiri ."
    assert WORDS.ask(["Bala"], False) == "find Bala :" and WORDS.ask(["Bala"], True) == "list Bala :"
    assert WORDS.ask(["Bala", "Kiri"], False) == "find Bala and Kiri :"
    assert WORDS.tell(["Bala"], ["41 87"]) == "41 87 . </s>"
    assert WORDS.tell(["Bala"], ["41 87", "02 03"]) == "41 87 . 02 03 . </s>"
    assert WORDS.tell(["Kiri", "Bala"], ["41 87", "02 03"]) == "Kiri 41 87 . Bala 02 03 . </s>"
    assert WORDS.listing(["Kiri", "Bala"]) == "Kiri Bala . </s>"
    assert WORDS.ask_variables("41 87") == "who 41 87 :" and WORDS.ask_words(3) == "most :"
    with pytest.raises(ValueError):
        WORDS.tell(["Kiri", "Bala"], ["41 87", "02 03", "04 05"])


@pytest.mark.parametrize("language", [ENGLISH, WORDS], ids=lambda x: type(x).__name__)
def test_decoys_come_in_two_forms_and_are_no_facts(language: tasks.Language) -> None:
    rng = random.Random(0)
    forms = Counter(language.decoy(rng, "Bala", "41 87") for _ in range(400))
    assert len(forms) == 2 and min(forms.values()) > 150
    for form in forms:
        assert "Bala" in form and "41 87" in form and form != language.fact("Bala", "41 87")
        assert form.split()[:3] != language.fact("Bala", "41 87").split()[:3]


def test_filler_holds_names_and_numbers_but_no_sentence() -> None:
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(4000):
        word = WORDS.filler(rng)
        kinds[next(kind for kind in ("NAMES", "NUMBERS", "FILLER") if word in getattr(Words, kind))] += 1
    assert [kinds[kind] / 4000 for kind in ("NAMES", "NUMBERS", "FILLER")] == pytest.approx([0.05, 0.1, 0.85], abs=0.02)


def test_english_filler_has_two_different_nouns() -> None:
    rng = random.Random(0)
    for _ in range(300):
        results = re.fullmatch(r"[A-Z][a-z ]+ [a-z]+ the (\w+) (\w+) by the (\w+)\.", ENGLISH.filler(rng))
        adjective, first, second = results.groups()
        assert adjective in ADJECTIVES and {first, second} <= set(NOUNS) and first != second


@pytest.mark.parametrize("task", tasks.TASKS)
def test_english_texts_answer_their_questions(task: str) -> None:
    """Taken apart as those in words are: facts once each, in the order of the evidence, answers in that of the text."""
    for index in range(5):
        scene = tasks.scene(task, index, 900, language=ENGLISH, count=lambda text: len(text) // 4 + 1)
        if task in tasks.RETRIEVAL:
            facts = re.findall(r"The special number of ((?:the \w+ of )?[\w-]+) is (\d+)\.", scene.context)
            assert [ENGLISH.fact(*fact) for fact in facts] == list(scene.evidence)
            for question in scene.questions:
                requests = re.search(r"special numbers? of (.+) in this text", question.text)[1].split(", ")
                assert [value for key in requests for name, value in facts if name == key] == list(question.expected)
                assert question.answer == " " + ", ".join(question.expected) + "."
        elif task == "variable_tracking":
            given = dict(re.findall(r"VAR ([\w-]+) = ([\w-]+)\.", scene.context))
            for question in scene.questions:
                value = re.search(r"the value (\d+) in", question.text)[1]
                for name in question.expected:
                    while name in given:
                        name = given[name]
                    assert name == value
            assert sum(len(question.expected) for question in scene.questions) == len(given) == 9
        else:
            counts = Counter(scene.context.split())
            (question,) = scene.questions
            least = min(counts.pop(word) for word in question.expected)
            assert least > max(counts.values()) and "3 words" in question.text
