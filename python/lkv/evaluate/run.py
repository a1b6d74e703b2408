"""Physical eviction, measured: every method answers one question about every text from the rows that it kept.

A text is read once. Every method evicts a fork of what was read, and decodes from what is left; nothing is masked.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import prefill
from lkv.evaluate.decode import answer, pad_left
from lkv.evaluate.forks import Forks, needs_of
from lkv.evaluate.methods import Method
from lkv.hf import Cache
from lkv.tasks import Sample
from lkv.text import check_fits, decode, encode, pad_and_ends

OBSERVED_WINDOW = 32


@dataclass
class Result:
    """One method at one retention on one sample.

    Attributes:
        score: 0 to 1. kept: rows of all heads and layers over those of the whole text.
        seconds: of scoring and eviction, of the batch it was in, per sample; those of a second pass apart. Of the CPU,
            or of the clock where the model is on a GPU.
        digest: of the sample.
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
    digest: str = ""

    @property
    def key(self) -> tuple[str, str, float]:
        return self.digest, self.method, self.retention


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


def digest(sample: Sample) -> str:
    """The same for the same sample everywhere."""
    return hashlib.sha256(repr(sample).encode()).hexdigest()[:16]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    setting: Setting,
) -> Iterator[Result]:
    """Results as they come, batch by batch.

    Raises:
        ValueError: for a sample without a context or a question, and one that is longer than what the model reads.
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
        check_fits(model, len(context) + len(question) + setting.limit, "lkv eval", f"{sample.task} {sample.index}")
    if setting.see_question:
        # The last token stays behind, so that there is something to decode from.
        contexts = [c + q[:-1] for c, q in zip(contexts, questions, strict=True)]
        questions = [q[-1:] for q in questions]
    tokens, mask = (t.to(model.device) for t in pad_left(contexts, pad))
    with prefill(model, tokens, mask, needs_of(methods), OBSERVED_WINDOW) as whole:
        clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        forks = Forks(model, tokenizer, whole, tokens, clock=clock)
        for method in methods:
            scores, second = forks.second_pass(method)
            for retention in method.retentions(setting.retentions):
                cache, seconds = forks.evicted(method, retention, scores)
                with cache:
                    kept = _kept(cache, mask)
                    rows = answer(model, cache, mask, questions, setting.limit, pad, ends)
                for b, (sample, row) in enumerate(zip(samples, rows, strict=True)):
                    text = decode(tokenizer, row)
                    yield Result(
                        sample.task, sample.index, method.name, retention, setting.metric(text, sample),
                        kept[b], text, seconds / len(samples), second / len(samples), digest(sample),
                    )  # fmt: skip


def _kept(cache: Cache, mask: Tensor) -> list[float]:
    """Rows that are there over rows that were there, counted in the caches themselves."""
    rows = [sum(counts) for counts in zip(*(layer.row_counts for layer in cache.ragged), strict=True)]
    whole = [sum(layer.heads for layer in cache.ragged) * length for length in mask.sum(1).tolist()]
    return [a / b for a, b in zip(rows, whole, strict=True)]


def by_method(results: Iterable[Result]) -> dict[tuple[str, float], list[Result]]:
    """Grouped by method and retention, in the order of their coming."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, result.retention), []).append(result)
    return groups
