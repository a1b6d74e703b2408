"""Answers from a cache that was evicted: the question is read, then greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lkv.hf import Cache
from lkv.hf.versions import with_cache


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """`[B, m]` tokens, and int64 1 for those that are no padding."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device="cpu")
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device="cpu")
    return tokens, mask


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    cache: Cache,
    seen: Tensor,
    questions: Sequence[Sequence[int]],
    limit: int,
    pad: int,
    ends: Sequence[int],
) -> list[list[int]]:
    """What the model writes after each question.

    Args:
        cache: of the texts that came before.
        seen: `[B, n]`, 1 for the tokens of these texts, 0 for padding, of which each has some.
        limit: most tokens of an answer.
        pad: a token for padding. ends: tokens that end an answer; they are left off.
    """
    tokens, present = pad_left(questions, pad)
    tokens, mask = tokens.to(model.device), torch.cat([seen, present.to(seen.device)], 1).to(model.device)
    places = (mask.cumsum(1) - 1)[:, seen.shape[1] :]
    stops = torch.tensor(list(ends), device=model.device)
    done = torch.zeros(len(questions), dtype=torch.bool, device=model.device)
    written: list[Tensor] = []
    decoder = model.get_decoder()
    for _ in range(limit):
        output = decoder(tokens, attention_mask=mask, position_ids=places, **with_cache(decoder, cache))
        hidden = output.last_hidden_state[:, -1:]
        tokens = model.get_output_embeddings()(hidden).argmax(-1)
        done |= torch.isin(tokens[:, 0], stops)
        written.append(torch.where(done[:, None], -1, tokens))
        if bool(done.all()):
            break
        tokens = tokens.masked_fill(done[:, None], pad)
        mask = torch.cat([mask, mask.new_ones(len(questions), 1)], 1)
        places = places[:, -1:] + 1
    rows = torch.cat(written, 1).tolist() if written else [[] for _ in questions]
    return [[token for token in row if token >= 0] for row in rows]
