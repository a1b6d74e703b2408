"""What the retriever is trained on: repeated sequences first, then texts with all questions that may be chosen."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lkv import tasks
from lkv.tasks import Words

IGNORE = -100
MIX = {
    "single": 1,
    "multi_key": 2,
    "multi_value": 10,
    "multi_query": 2,
    "key_value": 6,
    "variable_tracking": 2,
    "common_words": 0.5,
    "frequent_words": 0.5,
}


@dataclass(frozen=True)
class Stage:
    """Part of the curriculum, left when `accuracy` of the answer tokens is reached or after `steps`.

    Attributes:
        length: tokens of a text; 0: repeated sequences.
        facts: at most so many keys (records, values).
    """

    length: int
    facts: int
    batch: int
    steps: int
    accuracy: float = 0.97


def repeated(rng: torch.Generator, batch: int, vocabulary: int, longest: int = 32) -> tuple[Tensor, Tensor]:
    """Random sequences, each three times in a row: all but the first time can be known. Tokens and labels `[B, n]`."""
    length = int(torch.randint(8, longest + 1, (), generator=rng, device="cpu"))
    once = torch.randint(len(Words.SPECIAL), vocabulary, (batch, length), generator=rng, device="cpu")
    tokens = once.repeat(1, 3)
    labels = tokens.clone()
    labels[:, : length + 1] = IGNORE
    return tokens, labels


def texts(rng: random.Random, words: Words, stage: Stage, questions: int = 8) -> tuple[Tensor, Tensor]:
    """Texts of one length with questions and answers behind them; only the answers are labels. `[B, n]` each."""
    rows = [_text(rng, words, stage, questions) for _ in range(stage.batch)]
    longest = max(len(tokens) for tokens, _ in rows)
    pad, out = words.vocabulary["<pad>"], []
    for fill, part in ((pad, 0), (IGNORE, 1)):
        out.append(torch.tensor([row[part] + [fill] * (longest - len(row[part])) for row in rows], device="cpu"))
    return out[0], out[1]


def _text(rng: random.Random, words: Words, stage: Stage, questions: int) -> tuple[list[int], list[int]]:
    task = rng.choices(list(MIX), list(MIX.values()))[0]
    scene = tasks.scene(task, rng.randrange(10**9), stage.length, split="train", language=words, **size(task, stage))
    tokens = words.encode("<s> " + scene.context)
    labels = [IGNORE] * len(tokens)
    chosen = rng.sample(scene.questions, min(questions, len(scene.questions)))
    for question in chosen:
        text, answer = words.encode(question.text), words.encode(question.answer)
        tokens += text + answer
        labels += [IGNORE] * len(text) + answer
    return tokens, labels


def size(task: str, stage: Stage) -> dict[str, Any]:
    """As many facts as the stage has; the tasks' own numbers at the end."""
    facts = stage.facts
    if task in ("multi_key", "multi_query"):
        return {"keys": max(min(8, facts), 2)}
    if task == "multi_value":
        return (
            {"keys": 3, "values": 3}
            if facts >= 9
            else {"keys": 2, "values": 2}
            if facts >= 4
            else {"keys": 1, "values": 2}
        )
    if task == "key_value":
        return {"names": 3, "attributes": 3} if facts >= 9 else {"names": 2, "attributes": 2}
    if task == "variable_tracking":
        return {"chains": 3, "hops": 2} if facts >= 9 else {"chains": 2, "hops": 1}
    return {}
