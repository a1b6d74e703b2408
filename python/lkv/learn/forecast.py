"""How long a run on texts will take, estimated before it begins."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from lkv.learn.config import TrainConfig

# In prefills of a passage, as measured with SmolLM2-135M-Instruct in float32, 1000 tokens, one thread of a CPU: a
# record with its target, the teacher's own answers for it, a second pass for it, a text in a step of regression, a
# question in a step of distillation, a question that is validated at one retention.
RECORD, REPLIES, REPEAT, REGRESSION, DISTILLATION, VALIDATION = 1.6, 1.0, 1.3, 0.11, 0.33, 0.32


@torch.no_grad()
def prefill_seconds(model: PreTrainedModel, length: int) -> float:
    """Of one text of so many tokens, here and now."""
    tokens = torch.zeros(1, length, dtype=torch.int64, device=model.device)
    begin = 0.0
    for part in (tokens[:, :16], tokens):  # the first one takes what is taken once
        begin = time.perf_counter()
        hidden = model.get_decoder()(part, use_cache=True).last_hidden_state
        float(hidden[0, -1, 0])  # waits for a GPU
    return time.perf_counter() - begin


def forecast(config: TrainConfig, prefill: float, records: int) -> dict[str, float]:
    """Seconds of the parts of a run, roughly.

    Args:
        prefill: seconds of one text.
        records: passages that have to be read.
    """
    more = (config.replies == "own") * REPLIES + (config.target != "attention") * REPEAT
    questions = config.facts + (config.continuation > 0)
    judged = -(-config.steps // config.validate_every) * config.validation * len(config.validation_retentions)
    return {
        "reading": records * prefill * (RECORD + more),
        "regression": config.warm_steps * config.batch * prefill * REGRESSION,
        "distillation": config.steps * config.batch * config.questions * prefill * DISTILLATION,
        "validation": judged * questions * prefill * VALIDATION,
    }


def sentence(parts: dict[str, float]) -> str:
    """In minutes."""
    listed = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in parts.items())
    return f"about {sum(parts.values()) / 60:.0f} minutes: {listed}"
