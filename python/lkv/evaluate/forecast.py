"""How long an evaluation on passages will take, estimated before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lkv.evaluate.forks import repetitions
from lkv.evaluate.methods import Method
from lkv.evaluate.oracle import Oracle

# In prefills of a passage, as measured with SmolLM2-135M-Instruct in bfloat16 on 1000 tokens and one thread of a CPU:
# the answers of one method at one retention, a second pass, the attention of an oracle, a question that is read before
# the eviction, and an answer that is written freely.
ANSWERS, REPEAT, ORACLE, QUESTION, GREEDY = 0.75, 4.4, 1.05, 0.25, 0.4


def forecast(
    todo: Mapping[int, Sequence[Method]], prefill: float, questions: int, *, see_question: bool, greedy: bool
) -> dict[str, float]:
    """Seconds of the parts, roughly.

    Args:
        todo: for each passage the methods, each as often as there are retentions.
        prefill: seconds of one passage.
        questions: of a passage.
    """
    texts = questions if see_question else 1  # each with an eviction of its own
    reading = 1 + ANSWERS + (QUESTION * questions if see_question else 0)
    passes = oracles = answers = 0
    for methods in todo.values():
        passes += len(repetitions(methods))
        oracles += any(isinstance(method.policy, Oracle) for method in methods)
        answers += len(methods)
    return {
        "reading": len(todo) * prefill * reading,
        "second passes": passes * texts * prefill * REPEAT,
        "oracles": oracles * prefill * ORACLE,
        "answers": answers * prefill * (ANSWERS + GREEDY * questions * greedy),
    }
