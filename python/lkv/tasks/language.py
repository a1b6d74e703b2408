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

    A fact is `set Bala to 41 87 .` and a decoy `saw Bala at 41 87 .`; names and numbers stand alone as well. So a token
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


class English:
    """Sentences in the manner of RULER's, for any tokenizer; keys are pairs of words, values seven digits."""

    ADJECTIVES = (
        "amber ancient brave bright calm clever cold curious dusty eager early faint fair gentle golden grand happy "
        "hidden hollow humble idle jolly keen kind late little lonely lucky mellow misty noble odd pale plain proud "
        "quick quiet rapid rare rough round royal rusty secret sharp shiny silent silver simple sleepy small smooth "
        "soft solid steady still strange sturdy sunny swift tall tame tender tidy tiny vivid warm weary wild wise young"
    ).split()
    NOUNS = (
        "anchor apple badger barrel basket beacon bridge candle canyon carpet castle cedar circle cloud comet copper "
        "coral cradle cricket desert dolphin drum eagle ember engine falcon feather fern fiddle field forest fountain "
        "garden glacier hammer harbor harvest heron island jacket kettle ladder lantern lemon lizard maple marble "
        "meadow mirror needle ocean orchard otter paddle pebble pepper pillow planet pocket prairie quarry rabbit "
        "raven ribbon river saddle sailor shadow shelter spider spring stable summit temple thicket timber tunnel "
        "turtle valley velvet village violin walnut whistle willow window winter"
    ).split()
    ATTRIBUTES = ["age", "badge", "box", "code", "desk", "door", "locker", "plate", "room", "route", "seat", "ticket"]
    SUBJECTS = ["A farmer", "The ferry", "An old map", "The choir", "My neighbour", "The baker", "A visitor", "The wind"]
    VERBS = ["crossed", "followed", "forgot", "found", "passed", "remembered", "sketched", "watched"]

    def names(self, rng: random.Random, count: int) -> list[str]:
        pairs = rng.sample(range(len(self.ADJECTIVES) * len(self.NOUNS)), count)
        return [f"{self.ADJECTIVES[i // len(self.NOUNS)]}-{self.NOUNS[i % len(self.NOUNS)]}" for i in pairs]

    def attributes(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample(self.ATTRIBUTES, count)

    def values(self, rng: random.Random, count: int) -> list[str]:
        return [str(number) for number in rng.sample(range(10**6, 10**7), count)]

    def filler(self, rng: random.Random) -> str:
        first, second = rng.sample(self.NOUNS, 2)
        return f"{rng.choice(self.SUBJECTS)} {rng.choice(self.VERBS)} the {rng.choice(self.ADJECTIVES)} {first} by the {second}."

    def fact(self, key: str, value: str) -> str:
        return f"The special number of {key} is {value}."

    def decoy(self, rng: random.Random, key: str, value: str) -> str:
        return f"The number next to {key} was {value} once." if rng.random() < 0.5 else f"{value} people saw {key}."

    def key(self, name: str, attribute: str) -> str:
        return f"the {attribute} of {name}"

    def ask(self, keys: Sequence[str], many: bool) -> str:
        listed = ", ".join(keys)
        if many:
            return f"\nWhat are all the special numbers of {listed} in this text? All special numbers of {listed} are"
        if len(keys) > 1:
            return f"\nWhat are the special numbers of {listed} in this text? The special numbers of {listed} are"
        return f"\nWhat is the special number of {listed} in this text? The special number of {listed} is"

    def tell(self, keys: Sequence[str], values: Sequence[str]) -> str:
        return " " + ", ".join(values) + "."

    def assign(self, name: str, value: str) -> str:
        return f"VAR {name} = {value}."

    def ask_variables(self, value: str) -> str:
        return f"\nWhich variables have the value {value} in this text? The variables with the value {value} are"

    def ask_words(self, count: int) -> str:
        return f"\nWhich {count} words are the most frequent in this text? The {count} most frequent words are"

    def listing(self, words: Sequence[str]) -> str:
        return " " + ", ".join(words) + "."
