"""Facts in many wordings, to be woven into texts: a statement, a question about it, and how its answer begins.

Some wordings are never trained on: a test tells what was learned of facts from what was learned of sentences.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lkv.tasks.english import ADJECTIVES, NOUNS

FIRST = (
    "Ada", "Amir", "Beatriz", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ingrid", "Ivan", "Jonas",
    "Keiko", "Leila", "Marta", "Nadia", "Oscar", "Priya", "Quentin", "Rosa", "Stefan", "Tomas", "Ursula", "Viktor",
    "Wanda", "Xavier", "Yusuf", "Zofia", "Henrik", "Lucia", "Milan",
)  # fmt: skip
LAST = (
    "Abbott", "Bergman", "Castillo", "Dubois", "Eriksen", "Ferrara", "Gallagher", "Hartmann", "Ibarra", "Jansen",
    "Kowalski", "Lindqvist", "Moreau", "Novak", "Okafor", "Petrov", "Quinn", "Rossi", "Sandoval", "Tanaka", "Ueda",
    "Vasquez", "Whitlock", "Yilmaz", "Zimmer", "Brandt", "Calloway", "Delgado", "Fontaine", "Haldane", "Marlowe",
)  # fmt: skip
TOWN = (
    "Ash", "Birch", "Cald", "Dun", "Elm", "Fair", "Glen", "Holm", "Iver", "Kel", "Lang", "Mor", "Nor", "Oak", "Pen",
    "Raven", "Stan", "Thorn", "Wex", "Whit",
)  # fmt: skip
PLACE = ("borough", "bridge", "bury", "dale", "field", "ford", "ham", "haven", "mouth", "stead", "ton", "wick")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Wording:
    """Texts with places for {key} and {value}.

    Attributes:
        kind: of the value, one of `VALUES`. key: kind of the key, one of `KEYS`.
        statement: holds both. question, lead: hold the key; the value comes after the lead.
    """

    kind: str
    key: str
    statement: str
    question: str
    lead: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A wording with its key and value.

    Attributes:
        lead: how the answer begins; " {value}." comes next.
    """

    kind: str
    statement: str
    question: str
    lead: str
    value: str


def _table(kind: str, *rows: tuple[str, str, str, str]) -> tuple[Wording, ...]:
    return tuple(Wording(kind, *row) for row in rows)


TRAINED: tuple[Wording, ...] = (
    *_table(
        "number",
        ("thing", "One of the special magic numbers for {key} is: {value}.",
         "What is the special magic number for {key} mentioned in the provided text?",
         "The special magic number for {key} mentioned in the provided text is"),
        ("place", "The population of {key} is {value}.", "How many people live in {key}?",
         "The population of {key} is"),
        ("person", "{key} can be reached at extension {value}.", "At which extension can {key} be reached?",
         "{key} can be reached at extension"),
        ("project", "The budget of {key} was fixed at {value} dollars.", "How many dollars is the budget of {key}?",
         "The budget of {key} in dollars is"),
        ("thing", "In the archive, the {key} is filed under number {value}.",
         "Under which number is the {key} filed?", "The {key} is filed under number"),
        ("place", "The road to {key} closes after kilometer {value}.",
         "After which kilometer does the road to {key} close?", "The road to {key} closes after kilometer"),
        ("person", "According to the register, {key} owns {value} books.", "How many books does {key} own?",
         "The number of books that {key} owns is"),
    ),
    *_table(
        "name",
        ("project", "{key} is led by {value}.", "Who leads {key}?", "{key} is led by"),
        ("thing", "The {key} was built by {value}.", "Who built the {key}?", "The {key} was built by"),
        ("place", "The mayor of {key} is {value}.", "Who is the mayor of {key}?", "The mayor of {key} is"),
        ("person", "{key} shares an office with {value}.", "With whom does {key} share an office?",
         "{key} shares an office with"),
        ("project", "Questions about {key} should go to {value}.", "To whom should questions about {key} go?",
         "Questions about {key} should go to"),
        ("thing", "It was {value} who found the {key}.", "Who found the {key}?", "The {key} was found by"),
        ("place", "The only doctor in {key} was called {value}.", "What was the only doctor in {key} called?",
         "The only doctor in {key} was called"),
    ),
    *_table(
        "word",
        ("person", "The favorite object of {key} is the {value}.", "What is the favorite object of {key}?",
         "The favorite object of {key} is the"),
        ("project", "The code word for {key} is {value}.", "What is the code word for {key}?",
         "The code word for {key} is"),
        ("place", "The flag of {key} shows the {value}.", "What does the flag of {key} show?",
         "The flag of {key} shows the"),
        ("thing", "Next to the {key} they always put the {value}.", "What do they put next to the {key}?",
         "Next to the {key} they put the"),
        ("person", "{key} is afraid of the {value}.", "What is {key} afraid of?", "{key} is afraid of the"),
        ("project", "The symbol of {key} is the {value}.", "What is the symbol of {key}?",
         "The symbol of {key} is the"),
        ("place", "Travelers who come to {key} have to bring the {value}.",
         "What do travelers who come to {key} have to bring?", "Travelers who come to {key} have to bring the"),
    ),
    *_table(
        "date",
        ("person", "{key} was born on {value}.", "When was {key} born?", "{key} was born on"),
        ("project", "{key} begins on {value}.", "When does {key} begin?", "{key} begins on"),
        ("thing", "The {key} was last seen on {value}.", "When was the {key} last seen?",
         "The {key} was last seen on"),
        ("place", "The market of {key} first opened on {value}.", "When did the market of {key} first open?",
         "The market of {key} first opened on"),
        ("person", "The contract of {key} ends on {value}.", "When does the contract of {key} end?",
         "The contract of {key} ends on"),
        ("thing", "The insurance of the {key} expires on {value}.", "When does the insurance of the {key} expire?",
         "The insurance of the {key} expires on"),
    ),
    *_table(
        "code",
        ("place", "The access code for the gate at {key} is {value}.",
         "What is the access code for the gate at {key}?", "The access code for the gate at {key} is"),
        ("thing", "The serial number of the {key} is {value}.", "What is the serial number of the {key}?",
         "The serial number of the {key} is"),
        ("person", "{key} wrote the password {value} on a slip of paper.",
         "Which password did {key} write on a slip of paper?", "The password that {key} wrote is"),
        ("project", "All parts for {key} are ordered as {value}.", "As what are all parts for {key} ordered?",
         "All parts for {key} are ordered as"),
        ("place", "Flights to {key} have the number {value}.", "Which number do flights to {key} have?",
         "Flights to {key} have the number"),
        ("person", "The badge of {key} reads {value}.", "What does the badge of {key} read?",
         "The badge of {key} reads"),
    ),
)  # fmt: skip
UNSEEN: tuple[Wording, ...] = (
    *_table(
        "number",
        ("project", "So far {value} people have signed up for {key}.", "How many people have signed up for {key}?",
         "The number of people who have signed up for {key} is"),
        ("thing", "Whoever wants the {key} must pay {value} crowns.", "How many crowns does the {key} cost?",
         "The price of the {key} in crowns is"),
    ),
    *_table(
        "name",
        ("person", "When {key} is away, {value} takes over.", "Who takes over when {key} is away?",
         "When {key} is away, the one who takes over is"),
        ("place", "{value} painted the church of {key}.", "Who painted the church of {key}?",
         "The church of {key} was painted by"),
    ),
    *_table(
        "word",
        ("thing", "Inside the {key} lay the {value}.", "What lay inside the {key}?", "Inside the {key} lay the"),
        ("person", "For luck, {key} carries a small {value}.", "What does {key} carry for luck?",
         "For luck, {key} carries a small"),
    ),
    *_table(
        "date",
        ("place", "Since {value} no train has stopped in {key}.", "Since when has no train stopped in {key}?",
         "No train has stopped in {key} since"),
        ("project", "The deadline of {key} was moved to {value}.", "To when was the deadline of {key} moved?",
         "The deadline of {key} was moved to"),
    ),
    *_table(
        "code",
        ("thing", "Scratched into the {key} one reads {value}.", "What is scratched into the {key}?",
         "Scratched into the {key} is"),
        ("project", "Reports on {key} carry the mark {value}.", "Which mark do reports on {key} carry?",
         "Reports on {key} carry the mark"),
    ),
)  # fmt: skip


def _person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


KEYS: dict[str, Callable[[random.Random], str]] = {
    "thing": lambda rng: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
    "person": _person,
    "place": lambda rng: rng.choice(TOWN) + rng.choice(PLACE),
    "project": lambda rng: f"Project {rng.choice(NOUNS).capitalize()} {rng.randrange(2, 100)}",
}
VALUES: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.randrange(1000, 10**6)),
    "name": _person,
    "word": lambda rng: rng.choice(NOUNS),
    "date": lambda rng: f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1900, 2030)}",
    "code": lambda rng: f"{rng.choice(LETTERS)}{rng.choice(LETTERS)}-{rng.randrange(100, 10000)}-{rng.choice(LETTERS)}",
}


def draw(rng: random.Random, count: int, wordings: Sequence[Wording] = TRAINED) -> list[Fact]:
    """Facts of different keys and values. Of every four, two have one wording, so that the key matters as well: small
    models mix up more of them even with all of the text in view."""
    used: set[str] = set()

    def new(make: Callable[[random.Random], str]) -> str:
        while (found := make(rng)) in used:
            pass
        used.add(found)
        return found

    facts = []
    order = rng.sample(range(len(wordings)), len(wordings))
    for i in range(count):
        wording = wordings[order[(i - (i + 2) // 4) % len(order)]]  # 0 1 1 2, 3 4 4 5, ...
        key, value = new(KEYS[wording.key]), new(VALUES[wording.kind])
        statement, question, lead = (
            x.format(key=key, value=value) for x in (wording.statement, wording.question, wording.lead)
        )
        facts.append(Fact(wording.kind, statement, question, lead, value))
    rng.shuffle(facts)
    return facts
