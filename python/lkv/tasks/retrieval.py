"""Needles in a haystack after RULER (arXiv 2404.06654), and records with two-word keys.

Beside its facts a text has decoys: sentences with the same keys and values that answer nothing. They take `DECOYS` of
the tokens, more than fits into 15 %, so that a method that keeps all that looks like an answer loses some.
"""

from __future__ import annotations

import random

from lkv.tasks.language import Language
from lkv.tasks.scene import Count, Question, Scene, weave

DECOYS = 0.3  # share of the tokens


def single(rng: random.Random, language: Language, length: int, count: Count) -> Scene:
    """One key, one value."""
    return _keys(rng, language, length, count, 1)


def multi_key(rng: random.Random, language: Language, length: int, count: Count, keys: int = 8) -> Scene:
    """The value of one of many keys."""
    return _keys(rng, language, length, count, keys)


def multi_query(
    rng: random.Random, language: Language, length: int, count: Count, keys: int = 8, asked: int = 2
) -> Scene:
    """The values of several keys at once."""
    names, values = language.names(rng, keys), language.values(rng, keys)
    facts = dict(zip(names, values, strict=True))
    questions = []
    for _ in range(keys):
        chosen = rng.sample(names, asked)
        questions.append(_question(language, chosen, [facts[name] for name in chosen]))
    return _scene(rng, language, length, count, list(facts.items()), questions)


def multi_value(
    rng: random.Random, language: Language, length: int, count: Count, keys: int = 3, values: int = 3
) -> Scene:
    """All values of a key that has several, in the order of the text."""
    names, numbers = language.names(rng, keys), language.values(rng, keys * values)
    facts = [(name, numbers.pop()) for name in names for _ in range(values)]
    rng.shuffle(facts)
    questions = [
        _question(language, [name], [value for key, value in facts if key == name], many=True) for name in names
    ]
    return _scene(rng, language, length, count, facts, questions)


def key_value(
    rng: random.Random, language: Language, length: int, count: Count, names: int = 3, attributes: int = 3
) -> Scene:
    """Question answering over records: names share attributes, so that only both together are a key."""
    shared = language.attributes(rng, attributes)
    keys = [language.key(name, attribute) for name in language.names(rng, names) for attribute in shared]
    rng.shuffle(keys)
    facts = list(zip(keys, language.values(rng, len(keys)), strict=True))
    return _scene(rng, language, length, count, facts, [_question(language, [key], [value]) for key, value in facts])


def _keys(rng: random.Random, language: Language, length: int, count: Count, keys: int) -> Scene:
    facts = list(zip(language.names(rng, keys), language.values(rng, keys), strict=True))
    return _scene(rng, language, length, count, facts, [_question(language, [key], [value]) for key, value in facts])


def _question(language: Language, keys: list[str], values: list[str], many: bool = False) -> Question:
    return Question(language.ask(keys, many), language.tell(keys, values), tuple(values))


def _scene(
    rng: random.Random,
    language: Language,
    length: int,
    count: Count,
    facts: list[tuple[str, str]],
    questions: list[Question],
) -> Scene:
    evidence = [language.fact(key, value) for key, value in facts]
    decoys: list[str] = []
    space = min(DECOYS * length, length - sum(map(count, evidence)))
    wanted = [key for key, _ in facts]
    while True:
        # Some have the keys of the facts, so that neither key nor value alone identifies a sentence.
        key = rng.choice(wanted) if rng.random() < 0.3 else language.names(rng, 1)[0]
        decoys.append(language.decoy(rng, key, language.values(rng, 1)[0]))
        space -= count(decoys[-1])
        if space < 0:
            decoys.pop()
            break
    # The facts keep their order; answers of several values follow it.
    order = [True] * len(evidence) + [False] * len(decoys)
    rng.shuffle(order)
    left = {True: iter(evidence), False: iter(decoys)}
    sentences = [next(left[is_fact]) for is_fact in order]
    return Scene(weave(rng, sentences, lambda: language.filler(rng), length, count), tuple(questions), tuple(evidence))
