"""Which positions of one text every head keeps."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.hf import Cache
from lkv.policies import Policy
from lkv.tasks import Sample
from lkv.text import encode


@torch.no_grad()
def kept_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy, sample: Sample, retention: float
) -> dict[str, Any]:
    """`heads` with their name and positions, `evidence` as ranges of positions, `length`, `title`."""
    tokens = encode(tokenizer, sample.context, begins=True)
    with Cache(model, policy, retention=retention) as cache:
        model.get_decoder()(torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True)
        heads = []
        for layer in cache.ragged:
            rows = layer.rows
            assert rows is not None  # evicted by the call above
            begins, lengths = rows.cu_seqlens.tolist(), rows.lengths.flatten().tolist()
            heads += [
                {
                    "name": f"layer {layer.index}, head {h}",
                    "positions": rows.positions[begin : begin + length].tolist(),
                }
                for h, (begin, length) in enumerate(zip(begins, lengths, strict=False))
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
