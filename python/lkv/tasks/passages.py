"""Passages of files with facts woven in, and what comes behind them in the file; or texts of synthetic tasks."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lkv import tasks
from lkv.tasks.documents import Document
from lkv.tasks.english import English
from lkv.tasks.facts import TRAINED, Fact, Wording, draw
from lkv.tasks.scene import Count

# A sentence or a statement has ended: in prose, at the end of a line of code, before an empty line. What comes next
# begins with the space between.
ENDS = re.compile(r"""(?<=[.!?])(?=\s+["'(]?[A-Z0-9])|(?<=[.!?:;{})\]])(?=\n)|(?=\n\s*\n)""")
LONGEST = 400  # letters of a piece: texts without such places are cut at words


@dataclass(frozen=True)
class Passage:
    """
    Attributes:
        text: of the file, with the statements of the facts in it.
        facts: in the order of the text.
        continuation: what comes after the text in the file, at least as many tokens as were asked for.
    """

    domain: str
    document: str
    text: str
    facts: tuple[Fact, ...]
    continuation: str


def passage(
    documents: Sequence[Document],
    index: int,
    length: int,
    count: Count,
    *,
    split: str,
    facts: int = 4,
    continuation: int = 48,
    wordings: Sequence[Wording] = TRAINED,
    seed: int = 0,
) -> Passage:
    """Passage number `index` of a split; domains take turns. The same arguments give the same passage everywhere.

    Args:
        documents: of all splits.
        length: tokens of the text, at most and by a few.
        count: tokens of a text.
        continuation: tokens behind it that the file has to have.
        wordings: of the facts.

    Raises:
        ValueError: where no file of the split and the domain is long enough.
    """
    domain = domain_of(documents, index, split)
    rng = random.Random(f"passage/{seed}/{split}/{index}")
    candidates = [x for x in documents if x.split == split and x.domain == domain]
    woven = draw(rng, facts, wordings)
    space = length - sum(count(" " + fact.statement) for fact in woven)
    if space < 1:
        raise ValueError(f"lkv.tasks: expected passages of more than {length - space} tokens, which their facts need")
    for document in rng.sample(candidates, len(candidates)):
        cut = _cut(rng, document.text, space, continuation, count)
        if cut is not None:
            pieces, rest = cut
            return Passage(domain, document.name, *_weave(rng, pieces, woven), rest)
    raise ValueError(
        f"lkv.tasks: expected a file of more than {space + continuation} tokens in the split {split!r} of the domain "
        f"{domain!r}, got {len(candidates)} shorter ones"
    )


def domain_of(documents: Sequence[Document], index: int, split: str) -> str:
    """Of passage number `index` of a split.

    Raises:
        ValueError: for a split without documents.
    """
    domains = sorted({x.domain for x in documents if x.split == split})
    if not domains:
        raise ValueError(f"lkv.tasks: expected documents of the split {split!r}, got none")
    return domains[index % len(domains)]


def synthetic(task: str, index: int, length: int, count: Count, *, split: str, questions: int = 16) -> Passage:
    """The text of a synthetic task in English as a passage of the domain "synthetic", which nothing continues.

    Args:
        task, index, split: see `lkv.tasks.scene`.
        length: tokens of the text, at most and by a few. count: tokens of a text.
        questions: at most, drawn from all.

    Raises:
        ValueError: for an unknown task, and a length that the facts do not fit in.
    """
    scene = tasks.scene(task, index, length, split=split, language=English(), count=count)
    rng = random.Random(f"synthetic/{task}/{split}/{index}")
    facts = []
    for question in rng.sample(scene.questions, min(questions, len(scene.questions))):
        asked, mark, lead = question.text.strip().rpartition("?")
        value = question.answer.strip().removesuffix(".")
        facts.append(Fact(task, "", asked + mark, lead.strip(), value))
    return Passage("synthetic", f"{task}/{index}", scene.context, tuple(facts), "")


def pieces_of(text: str) -> list[str]:
    """A text in parts at whose ends a sentence has ended; together they are the text."""
    out = []
    for piece in filter(None, ENDS.split(text)):
        while len(piece) > LONGEST:
            place = piece.rfind(" ", 1, LONGEST)
            place = LONGEST if place < 0 else place
            out.append(piece[:place])
            piece = piece[place:]
        out.append(piece)
    return out


def _cut(rng: random.Random, text: str, space: int, behind: int, count: Count) -> tuple[list[str], str] | None:
    """Pieces of `space` tokens from somewhere in a text, and the text behind them; None where it is too short."""
    pieces = pieces_of(text)
    sample = text[:4000]
    wanted = 1.1 * (space + behind) * len(sample) / max(count(sample), 1)  # letters, roughly
    left, last = 0, len(pieces)
    while last and left < wanted:
        last -= 1
        left += len(pieces[last])
    for begin in dict.fromkeys((rng.randrange(last + 1), 0)):  # where the end is too near, from the beginning
        taken, rest = _take(pieces[begin:], space, count)
        if rest and count(rest[: 40 * behind + 40]) >= behind + 1:
            return taken, rest[: 40 * behind + 40]
    return None


def _take(pieces: Sequence[str], space: int, count: Count) -> tuple[list[str], str]:
    """Pieces, the last one cut at a word, of as many tokens, and all that comes after them."""
    taken: list[str] = []
    for i, whole in enumerate(pieces):
        piece = whole if taken else whole.lstrip()
        tokens = count(piece)
        if tokens <= space:
            taken.append(piece)
            space -= tokens
            continue
        words, end = re.split(r"(?=\s)", piece), 0
        for word in words:
            space -= count(word)
            if space < 0:
                break
            end += len(word)
        return [*taken, piece[:end]] if end else taken, piece[end:] + "".join(pieces[i + 1 :])
    return taken, ""


def _weave(rng: random.Random, pieces: Sequence[str], facts: Sequence[Fact]) -> tuple[str, tuple[Fact, ...]]:
    """Statements between pieces, on a line of their own where the next piece begins one; the last piece stays last."""
    places = sorted(rng.randrange(1, max(len(pieces), 2)) for _ in facts)
    text: list[str] = []
    done = 0
    for place, fact in zip(places, facts, strict=True):
        text += pieces[done:place]
        following = pieces[place] if place < len(pieces) else ""
        space = following[: len(following) - len(following.lstrip())]
        text.append(("\n" if "\n" in space else " ") + fact.statement)
        done = place
    return "".join(text + list(pieces[done:])), tuple(facts)
