"""Which positions of a text every head keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.hf import Cache
from lkv.policies import Policy
from lkv.tasks import Sample
from lkv.text import encode


def kept_rows(cache: Cache, sequence: int = 0) -> list[list[Tensor]]:
    """The rows that one sequence has in every layer of `cache.ragged`, for each KV head: int64 positions, ascending.

    Positions count from the first column of the batch, padding included. They are on the host.
    """
    found = []
    for layer in cache.ragged:
        if layer.rows is None:
            end = layer.get_seq_length()
            found.append([torch.arange(end - layer.token_counts[sequence], end, device="cpu")] * layer.heads)
        else:
            segments = slice(sequence * layer.heads, (sequence + 1) * layer.heads)
            begins, counts = layer.rows.cu_seqlens[segments].tolist(), layer.rows.lengths[sequence].tolist()
            positions = layer.rows.positions.cpu().long()
            found.append([positions[begin : begin + count] for begin, count in zip(begins, counts, strict=True)])
    return found


@torch.no_grad()
def kept_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy, sample: Sample, retention: float
) -> dict[str, Any]:
    """`heads` with their name and positions, `evidence` as ranges of positions, `length`, `title`."""
    tokens = encode(tokenizer, sample.context, begins=True)
    with Cache(model, policy, retention=retention) as cache:
        model.get_decoder()(torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True)
        heads = [
            {"name": f"layer {layer.index}, head {h}", "positions": positions.tolist()}
            for layer, rows in zip(cache.ragged, kept_rows(cache), strict=True)
            for h, positions in enumerate(rows)
        ]
    offset = len(tokens) - len(encode(tokenizer, sample.context))
    evidence = []
    for sentence in sample.evidence:
        begin = offset + len(encode(tokenizer, sample.context[: sample.context.index(sentence)]))
        evidence.append([begin, begin + len(encode(tokenizer, sentence))])
    return {
        "heads": heads,
        "evidence": evidence,
        "length": len(tokens),
        "title": f"{sample.task}: positions kept at {retention:.0%}; evidence shaded",
    }
