"""Accuracy through the relaxed mask that LKV was trained with, to be set beside what physical eviction gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.evaluate.run import found
from lkv.learn import distill
from lkv.policies.lkv import Learned
from lkv.tasks import Sample
from lkv.text import decode, encode, pad_and_ends

TEMPERATURE = 0.05  # default: the last of the training


@torch.no_grad()
def soft_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    policy: Learned,
    retention: float,
    batch: int = 16,
    limit: int = 24,
    temperature: float = TEMPERATURE,
) -> float:
    """Mean score where nothing is evicted and every token is seen as far as the relaxation keeps it."""
    _, ends = pad_and_ends(model, tokenizer)
    scores: list[float] = []
    for begin in range(0, len(samples), batch):
        part = samples[begin : begin + batch]
        reading = distill.read(model, policy, [encode(tokenizer, s.context, begins=True) for s in part])
        rates = torch.full((len(part),), retention, device=model.device)
        masks = distill.log_masks(policy, reading, rates, temperature, hard=False)
        questions = [encode(tokenizer, s.question) for s in part]
        replies = distill.answers(model, reading.context, questions, limit, ends, log_masks=masks)
        texts = (decode(tokenizer, tokens) for tokens in replies)
        scores += [found(text, s.expected) for text, s in zip(texts, part, strict=True)]
    return sum(scores) / len(scores)
