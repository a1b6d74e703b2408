"""A conversation with a model, its own cache or ours: turns of tokens, in chunks or whole, and greedy answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from families import call, tokens
from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Turn:
    """Tokens `[B, n]` and which are no padding, then an answer of `steps` tokens."""

    ids: Tensor
    mask: Tensor
    steps: int


def turn(lengths: list[int], steps: int, seed: int = 0) -> Turn:
    """One sequence for each length, padded on the left."""
    longest = max(lengths)
    ids = tokens(len(lengths), longest, seed)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return Turn(ids * mask, mask, steps)


@dataclass
class Talk:
    """All tokens `[B, L]`, which are no padding, and the logits `[B, L, V]` after each."""

    ids: Tensor
    mask: Tensor
    logits: Tensor


def talk(model: PreTrainedModel, cache: object, turns: list[Turn], chunk: int | None = None) -> Talk:
    """Feeds every token, those of the answers included, one at a time."""
    batch = turns[0].ids.shape[0]
    ids, mask, logits = torch.zeros(batch, 0, dtype=torch.long), torch.zeros(batch, 0, dtype=torch.long), []
    padded = any((t.mask == 0).any() for t in turns)

    def feed(new: Tensor, present: Tensor) -> None:
        nonlocal ids, mask
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, present], 1)
        logits.append(call(model, new, mask if padded else None, cache))

    with torch.no_grad():
        for t in turns:
            size = chunk or t.ids.shape[1]
            for begin in range(0, t.ids.shape[1], size):
                feed(t.ids[:, begin : begin + size], t.mask[:, begin : begin + size])
            for _ in range(t.steps):
                feed(logits[-1][:, -1].argmax(-1, keepdim=True), torch.ones(batch, 1, dtype=torch.long))
    return Talk(ids, mask, torch.cat(logits, 1))
