"""The languages in which tasks are written."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
        """A sentence that gives a key its value."""
        ...

    def decoy(self, rng: random.Random, key: str, value: str) -> str:
        """A sentence of the same key and value words that gives no key a value."""
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
