"""Answers that are given, token by token: what a cache foretells of each, beside what the full cache foretells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lkv.hf import Cache
from lkv.hf.versions import with_cache
from lkv.learn.distill import pad_right


@dataclass(frozen=True)
class Fidelity:
    """Of one answer.

    Attributes:
        tokens: how many it has. right: how many of them are foretold as the likeliest.
        kl: KL(full || evicted) in nats, summed over the tokens. same: for how many both foretell the same.
    """

    tokens: int
    right: int
    kl: float
    same: int

    @property
    def exact(self) -> bool:
        return self.right == self.tokens


@torch.no_grad()
def foretold(
    model: PreTrainedModel,
    cache: Cache,
    length: int,
    questions: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Log-probabilities float32 `[tokens of the reply, vocabulary]` for each reply, in one forward.

    Args:
        cache: of one text, evicted or not. It stays as it is.
        length: tokens of the text, evicted ones included.
    """
    if not questions:
        return []
    tokens, _ = pad_right([[*q, *a][:-1] for q, a in zip(questions, replies, strict=True)], model.device)
    count = tokens.shape[1]
    places = torch.arange(length, length + count, device=model.device).expand(len(tokens), -1)
    first = min(len(q) for q in questions) - 1  # nothing before is of an answer
    with cache.fork() as own:
        own.batch_repeat_interleave(len(questions))
        kept = count - first
        output = model(tokens, position_ids=places, logits_to_keep=kept, **with_cache(model, own))
    begins = [len(q) - 1 - first for q in questions]
    return [
        output.logits[b, begin : begin + len(reply)].float().log_softmax(-1)
        for b, (begin, reply) in enumerate(zip(begins, replies, strict=True))
    ]


def fidelity(full: Sequence[Tensor], evicted: Sequence[Tensor], replies: Sequence[Sequence[int]]) -> list[Fidelity]:
    """What is lost of what the full cache foretells, reply by reply."""
    out = []
    for teacher, student, reply in zip(full, evicted, replies, strict=True):
        likeliest = student.argmax(-1)
        right = likeliest == torch.tensor(reply, device=likeliest.device)
        kl = F.kl_div(student, teacher, reduction="sum", log_target=True)
        same = likeliest == teacher.argmax(-1)
        out.append(Fidelity(len(reply), int(right.sum()), float(kl), int(same.sum())))
    return out
