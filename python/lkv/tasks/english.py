"""English in the manner of RULER's templates (arXiv 2404.06654), for any tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence

ADJECTIVES = (
    "amber", "ancient", "brave", "bright", "calm", "clever", "cold", "curious", "dusty", "eager", "early", "faint",
    "fair", "gentle", "golden", "grand", "happy", "hidden", "hollow", "humble", "idle", "jolly", "keen", "kind",
    "late", "little", "lonely", "lucky", "mellow", "misty", "noble", "odd", "pale", "plain", "proud", "quick",
    "quiet", "rapid", "rare", "rough", "round", "royal", "rusty", "secret", "sharp", "shiny", "silent", "silver",
    "simple", "sleepy", "small", "smooth", "soft", "solid", "steady", "still", "strange", "sturdy", "sunny", "swift",
    "tall", "tame", "tender", "tidy", "tiny", "vivid", "warm", "weary", "wild", "wise", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "apple", "badger", "barrel", "basket", "beacon", "bridge", "candle", "canyon", "carpet", "castle",
    "cedar", "circle", "cloud", "comet", "copper", "coral", "cradle", "cricket", "desert", "dolphin", "drum", "eagle",
    "ember", "engine", "falcon", "feather", "fern", "fiddle", "field", "forest", "fountain", "garden", "glacier",
    "hammer", "harbor", "harvest", "heron", "island", "jacket", "kettle", "ladder", "lantern", "lemon", "lizard",
    "maple", "marble", "meadow", "mirror", "needle", "ocean", "orchard", "otter", "paddle", "pebble", "pepper",
    "pillow", "planet", "pocket", "prairie", "quarry", "rabbit", "raven", "ribbon", "river", "saddle", "sailor",
    "shadow", "shelter", "spider", "spring", "stable", "summit", "temple", "thicket", "timber", "tunnel", "turtle",
    "valley", "velvet", "village", "violin", "walnut", "whistle", "willow", "window", "winter",
)  # fmt: skip
ATTRIBUTES = (
    "age", "badge", "box", "code", "desk", "door", "locker", "plate", "room", "route", "seat", "ticket",
)  # fmt: skip
SUBJECTS = (
    "A farmer", "The ferry", "An old map", "The choir", "My neighbour", "The baker", "A visitor", "The wind",
)  # fmt: skip
VERBS = (
    "crossed", "followed", "forgot", "found", "passed", "remembered", "sketched", "watched",
)  # fmt: skip


class English:
    """Keys are pairs of words, values numbers of seven digits."""

    def names(self, rng: random.Random, count: int) -> list[str]:
        pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
        return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in pairs]

    def attributes(self, rng: random.Random, count: int) -> list[str]:
        return rng.sample(ATTRIBUTES, count)

    def values(self, rng: random.Random, count: int) -> list[str]:
        return [str(number) for number in rng.sample(range(10**6, 10**7), count)]

    def filler(self, rng: random.Random) -> str:
        first, second = rng.sample(NOUNS, 2)
        return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {first} by the {second}."

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
