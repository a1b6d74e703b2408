"""Physical eviction, measured: every method answers one question about every text from the rows that it kept.

A text is read once. Every method evicts a fork of what was read, and decodes from what is left; nothing is masked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import prefill, second_pass_scores
from lkv.evaluate.decode import answer, pad_left
from lkv.evaluate.methods import FLOOR, FULL, Method
from lkv.hf import Cache
from lkv.policies import Repetition
from lkv.policies.streaming_llm import StreamingLLM
from lkv.second_pass import in_words, repetition_of
from lkv.tasks import Sample
from lkv.text import decode, encode, pad_and_ends

SINK, WINDOW = 4, 32  # rows that the floor keeps
OBSERVED_WINDOW = 32


@dataclass
class Result:
    """One method at one retention on one sample.

    Attributes:
        score: 0 to 1. kept: rows of all heads and layers over those of the whole text.
        seconds: of scoring and eviction, of the batch it was in, per sample; those of a second pass apart.
    """

    task: str
    index: int
    method: str
    retention: float
    score: float
    kept: float
    text: str
    evict_seconds: float
    second_pass_seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What is the same for all methods.

    Attributes:
        see_question: whether the question is part of the text that is compressed.
        limit: most tokens of an answer.
        metric: what an answer to a sample scores, 0 to 1.
    """

    retentions: Sequence[float] = (0.05, 0.1, 0.15, 0.3)
    see_question: bool = False
    batch: int = 16
    limit: int = 24
    metric: Callable[[str, Any], float] = field(default=lambda text, sample: found(text, sample.expected))


def found(text: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that the text holds, as RULER counts."""
    return sum(word.lower() in text.lower() for word in expected) / len(expected)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    setting: Setting,
) -> Iterator[Result]:
    """Results as they come, batch by batch.

    Raises:
        ValueError: for a sample without a context or a question.
    """
    for begin in range(0, len(samples), setting.batch):
        yield from _batch(model, tokenizer, samples[begin : begin + setting.batch], methods, setting)


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    setting: Setting,
) -> Iterator[Result]:
    pad, ends = pad_and_ends(model, tokenizer)
    contexts = [encode(tokenizer, s.context, begins=True) for s in samples]
    questions = [encode(tokenizer, s.question) for s in samples]
    for sample, context, question in zip(samples, contexts, questions, strict=True):
        if not context or not question:
            missing = "question" if context else "context"
            raise ValueError(
                f"lkv eval: expected a {missing} of one or more tokens, got none: {sample.task} {sample.index}"
            )
    if setting.see_question:
        # The last token stays behind, so that there is something to decode from.
        contexts = [c + q[:-1] for c, q in zip(contexts, questions, strict=True)]
        questions = [q[-1:] for q in questions]
    tokens, mask = (t.to(model.device) for t in pad_left(contexts, pad))
    needs = frozenset().union(*(m.policy.needs for m in methods if m.policy is not None))
    with prefill(model, tokens, mask, needs, OBSERVED_WINDOW) as whole:
        passes: dict[Repetition, tuple[list[Tensor], float]] = {}  # methods that differ in their budgets share one
        for method in methods:
            scores, second = None, 0.0
            if method.second_pass:
                scorer = method.scorer
                assert scorer is not None  # the full cache has no second pass
                scorer = in_words(scorer, tokenizer)
                how = repetition_of(scorer)
                if how not in passes:
                    clock = time.perf_counter()
                    repeated = second_pass_scores(model, whole, tokens, scorer)
                    passes[how] = repeated, time.perf_counter() - clock
                scores, second = passes[how]
            for retention in [1.0] if method.policy is None and method.name == FULL else setting.retentions:
                with whole.fork() as cache:
                    clock = time.perf_counter()
                    _evict(cache, method, retention, scores)
                    seconds = (time.perf_counter() - clock) / len(samples)
                    kept = _kept(cache, mask)
                    rows = answer(model, cache, mask, questions, setting.limit, pad, ends)
                for b, (sample, row) in enumerate(zip(samples, rows, strict=True)):
                    text = decode(tokenizer, row)
                    yield Result(
                        sample.task, sample.index, method.name, retention, setting.metric(text, sample),
                        kept[b], text, seconds, second / len(samples),
                    )  # fmt: skip


def _evict(cache: Cache, method: Method, retention: float, scores: Sequence[Tensor] | None) -> None:
    if method.name == FULL:
        return
    if method.name == FLOOR:
        cache.evict(StreamingLLM(SINK), budget=SINK + WINDOW)
    else:
        cache.evict(method.policy, retention=retention, scores=scores)


def _kept(cache: Cache, mask: Tensor) -> list[float]:
    """Rows that are there over rows that were there, counted in the caches themselves."""
    rows = [sum(layer.row_counts[b] for layer in cache.ragged) for b in range(len(mask))]
    whole = [sum(layer.heads for layer in cache.ragged) * length for length in mask.sum(1).tolist()]
    return [a / b for a, b in zip(rows, whole, strict=True)]


def by_method(results: Iterable[Result]) -> dict[tuple[str, float], list[Result]]:
    """Grouped by method and retention, in the order of their coming."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, result.retention), []).append(result)
    return groups
