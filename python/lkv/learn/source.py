"""Texts and questions for training: what a step reads depends on seed and step alone, however often it is resumed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lkv import tasks
from lkv.learn.config import TrainConfig
from lkv.tasks import Language
from lkv.text import encode


@dataclass(frozen=True)
class Examples:
    """Texts, and of every one the same number of questions with the right answers, as tokens."""

    contexts: list[list[int]]
    questions: list[list[int]]
    answers: list[list[int]]


class Source:
    """Tasks in one language, for one tokenizer."""

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, language: Language) -> None:
        self.config, self.tokenizer, self.language = config, tokenizer, language

    def examples(self, step: int, rows: Sequence[int]) -> Examples:
        """Texts number `rows` of a step."""
        contexts: list[list[int]] = []
        questions: list[list[int]] = []
        answers: list[list[int]] = []
        for row in rows:
            rng = random.Random(f"{self.config.seed}/{step}/{row}")
            # In turns, so that a step has all tasks if it can.
            task = self.config.tasks[(step * self.config.batch + row) % len(self.config.tasks)]
            scene = tasks.scene(
                task,
                rng.randrange(2**40),
                self.config.length,
                split="train",
                language=self.language,
                count=self.count,
            )
            contexts.append(encode(self.tokenizer, scene.context, begins=True))
            chosen = rng.sample(scene.questions, min(self.config.questions, len(scene.questions)))
            chosen += rng.choices(scene.questions, k=self.config.questions - len(chosen))
            questions += [encode(self.tokenizer, question.text) for question in chosen]
            answers += [encode(self.tokenizer, question.answer) for question in chosen]
        return Examples(contexts, questions, answers)

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def retention(self, step: int) -> float:
        low, high = self.config.retention
        return low * (high / low) ** random.Random(f"{self.config.seed}/{step}/retention").random()
