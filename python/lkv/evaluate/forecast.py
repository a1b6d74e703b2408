"""How long an evaluation on passages will take, estimated before it begins."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lkv.compression import prefill
from lkv.evaluate.forced import foretold
from lkv.evaluate.forks import repetitions
from lkv.evaluate.methods import Method
from lkv.evaluate.oracle import Oracle
from lkv.evaluate.texts import Judge
from lkv.learn.dialogue import Exchange
from lkv.policies.random import Random

# As measured with SmolLM2-135M-Instruct on 1000 tokens. In times of reading a passage, between what was found in
# float32 and in bfloat16: a second pass, and the attention of an oracle. In times of an eviction with the answers
# behind it, in bfloat16: a question that is read before the eviction, and an answer that is written freely.
REPEAT, ORACLE = 2.0, 0.5
QUESTION, GREEDY = 0.3, 0.5


@dataclass(frozen=True)
class Clock:
    """Seconds of reading one passage, and of an eviction with the answers and the continuation behind it."""

    reading: float
    answers: float


def clock(judge: Judge, talk: Exchange, retention: float) -> Clock:
    """What these take here and now, with what the methods need observed, and this share of the rows kept."""
    model = judge.model
    last, first = talk.continuation[1:], talk.continuation[:1]
    taken = Clock(0.0, 0.0)
    for context in (talk.context[:16], talk.context):  # the first one takes what is taken once
        tokens = torch.tensor([context], device=model.device)
        times = [_now()]
        with prefill(model, tokens, needs=judge.needs, window=judge.window) as cache:
            times.append(_now())
            cache.evict(Random(sink=0, window=0), retention=retention)
            foretold(model, cache, len(context), talk.questions, talk.answers)
            foretold(model, cache, len(context), [first] if last else [], [last] if last else [])
            times.append(_now())
        taken = Clock(times[1] - times[0], times[2] - times[1])
    return taken


def _now() -> float:
    """When all that was asked for is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def forecast(
    todo: Mapping[int, Sequence[Method]], taken: Clock, questions: int, *, see_question: bool, greedy: bool
) -> dict[str, float]:
    """Seconds of the parts, roughly.

    Args:
        todo: for each passage the methods, each as often as there are retentions.
        taken: by one passage.
        questions: of a passage.
    """
    texts = questions if see_question else 1  # each with an eviction of its own
    before = QUESTION * questions if see_question else 0
    passes = oracles = judged = 0
    for methods in todo.values():
        passes += len(repetitions(methods))
        oracles += any(isinstance(method.policy, Oracle) for method in methods)
        judged += len(methods)
    return {
        "reading": len(todo) * (taken.reading + taken.answers * (1 + before)),
        "second passes": passes * texts * taken.reading * REPEAT,
        "oracles": oracles * taken.reading * ORACLE,
        "answers": judged * taken.answers * (1 + GREEDY * questions * greedy),
    }
