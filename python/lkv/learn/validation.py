"""How well a student that sees what eviction leaves foretells what the teacher does, on records of validation texts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lkv.learn import distill
from lkv.learn.lessons import Recorded
from lkv.policies.lkv import Learned


def fidelity(lessons: Recorded) -> Callable[[Learned], dict[str, float]]:
    """The negative KL(teacher || student) per token, for each of `validation_retentions`: of the answers to all
    questions, and of the continuations, if there are some. More is better, 0 is the full cache.

    Answers are not generated: those of the record are read by both, which is cheap and tells policies apart that answer
    alike.
    """

    @torch.no_grad()
    def validate(lkv: Learned) -> dict[str, float]:
        config, sums = lessons.config, dict[str, list[float]]()
        for i in range(len(lessons.records)):
            record = lessons.records[i]
            reading = lessons.reading([record])
            facts = len(record.questions) - record.continues
            parts = {"facts": slice(0, facts), "continuation": slice(facts, None)}
            for retention in config.validation_retentions:
                rates = torch.full((1,), retention, device=reading.tokens.device)
                masks = distill.log_masks(lkv, reading, rates, config.temperature[1], hard=True)
                for name, part in parts.items():
                    if not (questions := record.questions[part]):
                        continue
                    repeated = masks.repeat_interleave(len(questions), 1)
                    context = reading.context.repeat(len(questions))
                    loss, tokens, _ = distill.divergence(
                        lessons.model, context, repeated, questions, record.replies[part]
                    )
                    total = sums.setdefault(f"{retention:g} {name}", [0.0, 0.0])
                    total[0] -= float(loss)
                    total[1] += tokens
        return {name: loss / tokens for name, (loss, tokens) in sums.items()}

    return validate
