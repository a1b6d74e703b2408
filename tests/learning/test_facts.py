"""Facts of many wordings: of five kinds, a key and a value each, some of them never trained on."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from lkv.tasks.facts import KEYS, TRAINED, UNSEEN, VALUES, Wording, draw

SHAPES = {
    "number": r"\d{4,6}",
    "name": r"[A-Z]\w+ [A-Z]\w+",
    "word": r"[a-z]+",
    "date": r"\d{1,2} [A-Z][a-z]+ (19|20)\d\d",
    "code": r"[A-Z]{2}-\d{3,4}-[A-Z]",
}


def test_there_are_many_of_every_kind_and_none_is_in_both_parts() -> None:
    assert len(TRAINED) >= 30 and len(UNSEEN) >= 10
    for part, least in ((TRAINED, 6), (UNSEEN, 2)):
        assert min(Counter(x.kind for x in part)[kind] for kind in VALUES) >= least
        assert {x.key for x in part} == set(KEYS)
    for name in ("statement", "question", "lead"):
        texts = [getattr(x, name) for x in (*TRAINED, *UNSEEN)]
        assert len(set(texts)) == len(texts), name


@pytest.mark.parametrize("wording", [*TRAINED, *UNSEEN], ids=lambda x: x.statement)
def test_a_question_names_the_key_and_not_the_value(wording: Wording) -> None:
    assert wording.statement.count("{key}") == wording.statement.count("{value}") == 1
    assert wording.statement.endswith(".")
    for text in (wording.question, wording.lead):
        assert text.count("{key}") == 1 and "{value}" not in text
    assert wording.question.endswith("?") and wording.lead[-1].isalpha()


@pytest.mark.parametrize("wordings", [TRAINED, UNSEEN], ids=["trained", "unseen"])
@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_facts_differ_in_keys_and_values_and_some_share_a_wording(count: int, wordings: tuple[Wording, ...]) -> None:
    facts = draw(random.Random(count), count, wordings)
    assert len(facts) == count and facts == draw(random.Random(count), count, wordings)
    assert facts != draw(random.Random(count + 1), count, wordings)
    for name in ("statement", "question", "value"):
        assert len({getattr(x, name) for x in facts}) == count
    for fact in facts:
        assert re.fullmatch(SHAPES[fact.kind], fact.value)
        assert fact.value in fact.statement and fact.value not in fact.question + fact.lead
    each = Counter(_wording(x.statement, wordings) for x in facts)
    if count == 30:
        assert len(each) == min(23, len(wordings))
    else:
        assert sorted(each.values()) == {1: [1], 2: [1, 1], 5: [1, 1, 1, 2]}[count]


def _wording(statement: str, wordings: tuple[Wording, ...]) -> int:
    """The number of the wording that a statement is of."""
    for i, wording in enumerate(wordings):
        pattern = re.escape(wording.statement).replace(r"\{key\}", "(.+)").replace(r"\{value\}", "(.+)")
        if re.fullmatch(pattern, statement):
            return i
    raise AssertionError(statement)
