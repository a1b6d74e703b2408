"""What a step of training learns from: texts that were read, and what the teacher made of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lkv.hf.token_log import Rotations
from lkv.learn import distill, targets
from lkv.learn.config import TrainConfig
from lkv.learn.distill import Reading
from lkv.learn.records import Record, Records
from lkv.learn.source import Examples, Source
from lkv.passes import Context
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv import Learned
from lkv.second_pass import repeat_scores
from lkv.text import check_fits

Answered = tuple[Reading, Sequence[Sequence[int]], Sequence[Sequence[int]]]


class Lessons(Protocol):
    """Texts number `rows` of a step, the same whenever they are needed."""

    def inputs(self, rows: Sequence[int]) -> Reading:
        """Texts of the first step."""
        ...

    def regression(self, step: int, rows: Sequence[int]) -> tuple[Reading, list[Tensor]]:
        """With the logarithm of the target, per layer float32 `[B, H, n]`, anything in padding."""
        ...

    def distillation(self, step: int, rows: Sequence[int]) -> Answered:
        """With questions and the teacher's answers, the same number for each text."""
        ...

    def shares(self, rows: Sequence[int], retention: float) -> Tensor:
        """`[N, H]`, that heads win by the target where they compete, on average over texts."""
        ...


class Live:
    """New texts in every step, which the model reads there and then."""

    def __init__(self, model: PreTrainedModel, lkv: Learned, source: Source, ends: Sequence[int]) -> None:
        self.model, self.lkv, self.source, self.ends = model, lkv, source, ends
        self.config: TrainConfig = source.config

    def inputs(self, rows: Sequence[int]) -> Reading:
        first = -1 if self.config.warm_steps else 0
        return distill.read(self.model, self.lkv, self._examples(first, rows).contexts)

    def regression(self, step: int, rows: Sequence[int]) -> tuple[Reading, list[Tensor]]:
        examples = self._examples(-1 - step, rows)
        reading = distill.read(self.model, self.lkv, examples.contexts)
        paid: list[Tensor] = []
        if self.config.target != "kvzip":
            replies = self._replies(reading, examples)
            paid = targets.attention(self.model, reading.context, examples.questions, replies)
        if self.config.target != "attention":
            repeated = repeat_scores(self.model, reading.context, reading.tokens, KVzip())
            weight = self.config.kvzip_weight
            paid = targets.larger(paid, [weight * x for x in repeated]) if paid else repeated
        return reading, [targets.logarithm(x) for x in paid]

    def distillation(self, step: int, rows: Sequence[int]) -> Answered:
        examples = self._examples(step, rows)
        reading = distill.read(self.model, self.lkv, examples.contexts)
        return reading, examples.questions, self._replies(reading, examples)

    def shares(self, rows: Sequence[int], retention: float) -> Tensor:
        reading, target = self.regression(0, rows)
        won = targets.joint_shares(reading.context.lengths, target, retention, self.lkv.sink, self.lkv.window)
        return won.mean(0)

    def _examples(self, step: int, rows: Sequence[int]) -> Examples:
        examples = self.source.examples(step, rows)
        longest = max(map(len, examples.contexts)) + max(map(len, examples.questions))
        check_fits(self.model, longest + self.config.answer_tokens, "lkv train")
        return examples

    def _replies(self, reading: Reading, examples: Examples) -> list[list[int]]:
        context = reading.context.repeat(self.config.questions)
        limit = self.config.answer_tokens
        return distill.answers(self.model, context, examples.questions, limit, self.ends, examples.answers)


class Recorded:
    """Texts that were read before, over and over, in another order each time."""

    def __init__(self, model: PreTrainedModel, lkv: Learned, records: Records, config: TrainConfig) -> None:
        self.model, self.lkv, self.records, self.config = model, lkv, records, config

    def inputs(self, rows: Sequence[int]) -> Reading:
        return self.reading(self._chosen("warm", 0, rows))

    def regression(self, step: int, rows: Sequence[int]) -> tuple[Reading, list[Tensor]]:
        records = self._chosen("warm", step, rows)
        reading = self.reading(records)
        target = _padded([self._target(x).float() for x in records], reading.tokens.shape[1])
        return reading, list(target.to(self.model.device))

    def distillation(self, step: int, rows: Sequence[int]) -> Answered:
        """The continuation, if there is one and it is not the only question, and questions drawn anew."""
        records, questions, replies = self._chosen("distil", step, rows), [], []
        for row, record in zip(rows, records, strict=True):
            rng = random.Random(f"{self.config.seed}/{step}/{row}")
            numbers = list(range(len(record.questions) - record.continues))
            chosen = [len(numbers)] if record.continues and self.config.questions > 1 else []
            more = self.config.questions - len(chosen)
            chosen += rng.sample(numbers, min(more, len(numbers))) + rng.choices(numbers, k=max(more - len(numbers), 0))
            questions += [record.questions[i] for i in chosen]
            replies += [record.replies[i] for i in chosen]
        return self.reading(records), questions, replies

    def shares(self, rows: Sequence[int], retention: float) -> Tensor:
        """Of all records, whatever the rows."""
        won = []
        for i in range(len(self.records)):
            record = self.records[i]
            target = list(self._target(record).float()[:, None])
            lengths = torch.tensor([len(record.tokens)], device="cpu")
            won.append(targets.joint_shares(lengths, target, retention, self.lkv.sink, self.lkv.window))
        return torch.cat(won).mean(0)

    def reading(self, records: Sequence[Record]) -> Reading:
        """As `distill.read` gives it, with keys and values rounded to bfloat16."""
        device, dtype = self.model.device, self.model.dtype
        tokens, lengths = distill.pad_right([x.tokens.tolist() for x in records], device)
        size = tokens.shape[1]
        keys, values = (
            _padded([getattr(x, name) for x in records], size).to(device, dtype) for name in ("keys", "values")
        )
        if self.lkv.token_scorer.input == "hidden":
            seen = _padded([x.hidden[:, None] for x in records if x.hidden is not None], size).to(device, dtype)
        else:
            before = _padded([_unrotated(x, dtype) for x in records], size).to(device)
            seen = torch.cat([before, values], -1)
        return Reading(tokens, Context(tuple(keys), tuple(values), lengths), tuple(seen))

    def _chosen(self, part: str, step: int, rows: Sequence[int]) -> list[Record]:
        """Every record once before any comes again."""
        count, chosen = len(self.records), []
        for row in rows:
            time, place = divmod(step * self.config.batch + row, count)
            order = list(range(count))
            random.Random(f"{self.config.seed}/{part}/{time}").shuffle(order)
            chosen.append(self.records[order[place]])
        return chosen

    def _target(self, record: Record) -> Tensor:
        """The logarithm, `[N, H, n]`."""
        if self.config.target == "attention":
            return record.attention
        if record.kvzip is None:
            raise ValueError(f"lkv train: expected records with a second pass for the target {self.config.target!r}")
        if self.config.target == "kvzip":
            return record.kvzip
        weighted = record.kvzip.float() + math.log(self.config.kvzip_weight)
        return torch.maximum(record.attention, weighted)


def _unrotated(record: Record, dtype: torch.dtype) -> Tensor:
    """Keys before RoPE, `[N, H, n, D]`."""
    assert record.cos is not None and record.sin is not None
    rotations = Rotations()
    rotations.load([(cos[None], sin[None]) for cos, sin in zip(record.cos, record.sin, strict=True)])
    pairs = zip(record.rotation, record.keys, strict=True)
    return torch.cat([rotations.all[i].undo(keys[None].to(dtype)) for i, keys in pairs])


def _padded(parts: Sequence[Tensor], size: int) -> Tensor:
    """`[N, B, H, size, ...]` of B parts `[N, H, n, ...]`, with zeros behind each."""
    layers, heads, _, *rest = parts[0].shape
    out = parts[0].new_zeros(layers, len(parts), heads, size, *rest)
    for b, part in enumerate(parts):
        out[:, b, :, : part.shape[2]] = part
    return out
