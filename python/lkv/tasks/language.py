"""The two languages that tasks are told in: a small vocabulary of whole words, and English after RULER's templates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Protocol


class Language(Protocol):
    """How facts, questions and answers are put into words."""

    def names(self, rng: random.Random, count: int) -> list[str]: ...

    def attributes(self, rng: random.Random, count: int) -> list[str]: ...

    def values(self, rng: random.Random, count: int) -> list[str]: ...

    def filler(self, rng: random.Random) -> str:
        """Text between the facts. It may hold names and values."""
        ...

    def fact(self, key: str, value: str) -> str:
        """A sentence that says which value a key has."""
        ...

    def decoy(self, rng: random.Random, key: str, value: str) -> str:
        """A sentence of the same key and value words that says nothing of the sort."""
        ...

    def key(self, name: str, attribute: str) -> str: ...

    def ask(self, keys: Sequence[str], many: bool) -> str:
        """For the value of every key, or for the `many` values of one."""
        ...

    def tell(self, keys: Sequence[str], values: Sequence[str]) -> str:
        """The answer to it: one value, the values of several keys, or several values of one key."""
        ...

    def assign(self, name: str, value: str) -> str:
        """A variable that is given a value, or the value of another variable."""
        ...

    def ask_variables(self, value: str) -> str: ...

    def ask_words(self, count: int) -> str:
        """For the words that the text uses most."""
        ...

    def listing(self, words: Sequence[str]) -> str:
        """The answer to the latter two."""
        ...


def _syllables(first: str, vowels: str, second: str) -> list[str]:
    return ["".join(letters) for letters in product(first, vowels, second, vowels)]


class Words:
    """512 words of which each is a token: what the retriever reads.

    A fact is `set Bado to 41 87 .` and a decoy `saw Bado at 41 87 .`; names and numbers stand alone as well. So a token
    tells by itself whether it may belong to an answer, never whether it does.
    """

    NAMES = [word.capitalize() for word in _syllables("bdkm", "aio", "ltrs")][:128]
    NUMBERS = [f"{n:02}" for n in range(100)]
    ATTRIBUTES = ["age", "bed", "cup", "dog", "egg", "fan", "gem", "hat", "ink", "jar", "kit", "log"]
    STRUCTURE = [".", ":", "set", "to", "saw", "at", "met", "by", "find", "list", "and", "let", "be", "who", "most"]
    FILLER = _syllables("fgnpvz", "aeou", "lnr")[:240]
    SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]

    def __init__(self) -> None:
        words = self.SPECIAL + self.STRUCTURE + self.ATTRIBUTES + self.NUMBERS + self.NAMES + self.FILLER
        self.vocabulary = {word: i for i, word in enumerate(words)}

    def encode(self, text: str) -> list[int]:
        return [self.vocabulary[word] for word in text.split()]

    def names(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample(self.NAMES, count)

    def attributes(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample(self.ATTRIBUTES, count)

    def values(self, rng: random.Random, count: int) -> list[str]:
        """Two numbers each."""
        pairs = rng.sample(range(len(self.NUMBERS) ** 2), count)
        return [f"{pair // 100:02} {pair % 100:02}" for pair in pairs]

    def filler(self, rng: random.Random) -> str:
        kind = rng.random()
        return rng.choice(self.NAMES if kind < 0.05 else self.NUMBERS if kind < 0.15 else self.FILLER)

    def fact(self, key: str, value: str) -> str:
        return f"set {key} to {value} ."

    def decoy(self, rng: random.Random, key: str, value: str) -> str:
        return f"saw {key} at {value} ." if rng.random() < 0.5 else f"met {key} by {value} ."

    def key(self, name: str, attribute: str) -> str:
        return f"{name} {attribute}"

    def ask(self, keys: Sequence[str], many: bool) -> str:
        return f"{'list' if many else 'find'} {' and '.join(keys)} :"

    def tell(self, keys: Sequence[str], values: Sequence[str]) -> str:
        if len(values) == 1:
            return f"{values[0]} . </s>"
        if len(keys) == 1:
            return " . ".join(values) + " . </s>"
        return " . ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True)) + " . </s>"

    def assign(self, name: str, value: str) -> str:
        return f"let {name} be {value} ."

    def ask_variables(self, value: str) -> str:
        return f"who {value} :"

    def ask_words(self, count: int) -> str:
        return "most :"

    def listing(self, words: Sequence[str]) -> str:
        return " ".join(words) + " . </s>"
