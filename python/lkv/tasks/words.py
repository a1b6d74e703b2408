"""A language of 499 words, each of them a token: what the retriever reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product


def _syllables(first: str, vowels: str, second: str) -> list[str]:
    return ["".join(letters) for letters in product(first, vowels, second, vowels)]


class Words:
    """Facts in words that tell by themselves whether they may belong to an answer, never whether they do.

    A fact is `set Bala to 41 87 .` and a decoy `saw Bala at 41 87 .`; names and numbers stand alone as well.
    """

    NAMES = tuple(word.capitalize() for word in _syllables("bdkm", "aio", "ltrs"))[:128]
    NUMBERS = tuple(f"{n:02}" for n in range(100))
    ATTRIBUTES = ("age", "bed", "cup", "dog", "egg", "fan", "gem", "hat", "ink", "jar", "kit", "log")
    STRUCTURE = (".", ":", "set", "to", "saw", "at", "met", "by", "find", "list", "and", "let", "be", "who", "most")
    FILLER = tuple(_syllables("fgnpvz", "aeou", "lnr"))[:240]
    SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")

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
