"""The settings of a training run, checked before it begins."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from lkv import tasks
from lkv.policies.lkv.checkpoint import Design

TARGETS = ("attention", "kvzip", "both")
STARTS = ("flat", "joint")
REPLIES = ("right", "own")


@dataclass(frozen=True)
class TrainConfig:
    """
    Attributes:
        target: what LKV-T is regressed on: "attention": the most attention that the teacher pays to a row from the
            questions and its answers; "kvzip": from a repetition of the text; "both": the larger one of the two.
        kvzip_weight: what attention from a repetition is multiplied by in the target "both". A repetition needs every
            token once: at weight 1 it leaves little of a small budget for what questions need.
        start: of the budgets: "flat", or "joint": the shares that heads win when the rows of all heads compete by the
            target, at the geometric mean of the retentions.
        steps: of distillation. warm_steps: of the regression of LKV-T before; 0 for none.
        batch: texts of a step, over all processes and accumulated parts together. accumulate: parts of a step.
        questions: per text, each by itself.
        length: tokens of a text. longest: of training passages, whose lengths are drawn evenly in their logarithm from
            `length` to this; 0: all have `length`.
        retention: lowest and highest, drawn anew for every step, evenly in its logarithm.
        temperature: first and last, in units of the scores: a head's deviation, or a factor e in attention where they
            are absolute; falls as a cosine until the hard part.
        hard: share of the steps, the last ones, in which the student sees what eviction leaves.
        lr_budget, lr_scorer: of LKV-H and LKV-T; both rise over 5 % of the steps and fall as a cosine.
        validate_every: steps between physical evictions of `validation` texts per task; the best checkpoint is kept.
        validation_retentions: the mean accuracy over these decides.
        texts: passages of files that are recorded once and read again and again, where files are given. facts: that are
            woven into each. continuation: tokens behind a passage that the student has to foretell as the teacher does.
        synthetic: share of the passages that are texts of the synthetic `tasks` in place of files.
        replies: to questions about passages: "right": the right answers, of which a small teacher foretells a part even
            where it would not give them by itself; "own": those that the teacher writes.
    """

    design: Design = field(default_factory=Design)
    tasks: tuple[str, ...] = tasks.RETRIEVAL
    target: str = "kvzip"
    kvzip_weight: float = 1.0
    start: str = "flat"
    steps: int = 600
    warm_steps: int = 150
    batch: int = 8
    accumulate: int = 1
    questions: int = 4
    length: int = 1024
    longest: int = 0
    retention: tuple[float, float] = (0.05, 0.5)
    temperature: tuple[float, float] = (1.0, 0.05)
    hard: float = 0.3
    lr_budget: float = 2e-2
    lr_scorer: float = 2e-3
    answer_tokens: int = 24
    validate_every: int = 100
    validation: int = 16
    validation_retentions: tuple[float, ...] = (0.05, 0.15)
    texts: int = 200
    facts: int = 4
    continuation: int = 48
    synthetic: float = 0.0
    replies: str = "right"
    seed: int = 0

    def __post_init__(self) -> None:
        def expect(condition: bool, expected: str, got: object) -> None:
            if not condition:
                raise ValueError(f"lkv train: expected {expected}, got {got}")

        for name in ("steps", "batch", "accumulate", "questions", "length", "answer_tokens", "validate_every", "texts"):
            expect(getattr(self, name) >= 1, f"{name} >= 1", getattr(self, name))
        expect(self.target in TARGETS, f"a target of {', '.join(TARGETS)}", repr(self.target))
        expect(0 < self.kvzip_weight <= 1, "kvzip_weight in (0, 1]", self.kvzip_weight)
        expect(self.start in STARTS, f"a start of {', '.join(STARTS)}", repr(self.start))
        expect(self.replies in REPLIES, f"replies of {', '.join(REPLIES)}", repr(self.replies))
        expect(self.facts >= 1, "facts >= 1", self.facts)
        expect(0 <= self.synthetic < 1, "synthetic in [0, 1)", self.synthetic)
        expect(self.continuation >= 0, "continuation >= 0", self.continuation)
        expect(self.warm_steps >= 0, "warm_steps >= 0", self.warm_steps)
        low, high = self.retention
        expect(0 < low <= high <= 1, "retention 0 < low <= high <= 1", self.retention)
        expect(min(self.temperature) > 0, "temperatures above 0", self.temperature)
        expect(0 <= self.hard <= 1, "hard in [0, 1]", self.hard)
        protected = self.design.sink + self.design.window
        expect(self.length > protected, f"a length above the {protected} protected tokens", self.length)
        expect(self.longest == 0 or self.longest >= self.length, "longest 0 or >= length", self.longest)
        unknown = [task for task in self.tasks if task not in tasks.TASKS]
        expect(bool(self.tasks) and not unknown, f"tasks of {', '.join(tasks.TASKS)}", unknown or "none")
        expect(self.batch % self.accumulate == 0, "a batch that accumulate divides", self.batch)

    @property
    def soft_steps(self) -> int:
        return round(self.steps * (1 - self.hard))

    def temperature_at(self, step: int) -> float:
        first, last = self.temperature
        if step >= self.soft_steps:
            return last
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / self.soft_steps))

    def length_of(self, split: str, index: int) -> int:
        """Tokens of passage number `index` of a split."""
        if split != "train" or self.longest == 0:
            return self.length
        drawn = random.Random(f"length/{self.seed}/{index}").random()
        return round(self.length * (self.longest / self.length) ** drawn)

    def rate_at(self, step: int, steps: int) -> float:
        """The factor of the learning rates at a step."""
        rise = max(steps // 20, 1)
        return min((step + 1) / rise, 1.0) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
