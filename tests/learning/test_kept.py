"""Which positions a head keeps, and where the evidence stands: what the picture of one text is drawn from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import tasks
from lkv.compression import compress
from lkv.evaluate.kept import kept_positions, kept_rows
from lkv.hf import Cache
from lkv.policies.adakv import AdaKV
from lkv.policies.streaming_llm import StreamingLLM
from lkv.text import encode


@pytest.mark.parametrize("task", [*tasks.RETRIEVAL, "variable_tracking"])
@pytest.mark.parametrize("begins", [True, False])
def test_evidence_is_where_its_sentences_are(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, begins: bool
) -> None:
    """With a beginning token in front of the text, and without one."""
    bos = tokenizer.bos_token
    tokenizer.bos_token = bos if begins else None
    try:
        for index in range(3):
            sample = tasks.make(task, index, 150)
            results = kept_positions(model, tokenizer, StreamingLLM(), sample, 0.3)
            text = encode(tokenizer, sample.context, begins=True)
            assert results["length"] == len(text) == 150 + begins
            assert [tokenizer.decode(text[begin:end]) for begin, end in results["evidence"]] == list(sample.evidence)
    finally:
        tokenizer.bos_token = bos


def test_evidence_that_stands_twice_is_where_it_stands_first(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    sample = tasks.make("single", 0, 100)
    (fact,) = sample.evidence
    twice = replace(sample, context=f"{fact} gone {fact} {sample.context}")
    assert kept_positions(model, tokenizer, StreamingLLM(), twice, 0.3)["evidence"] == [[1, 7]]


@pytest.mark.parametrize("retention", [0.2, 0.5])
def test_positions_are_those_of_each_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, retention: float
) -> None:
    sample = tasks.make("multi_key", 1, 120)
    results = kept_positions(model, tokenizer, StreamingLLM(), sample, retention)
    keep = round(retention * 121)
    assert [head["name"] for head in results["heads"]] == [f"layer {n}, head {h}" for n in range(3) for h in range(2)]
    assert all(head["positions"] == [0, 1, 2, 3, *range(121 - keep + 4, 121)] for head in results["heads"])
    assert results["title"] == f"multi_key: positions kept at {100 * retention:.0f}%; evidence shaded"


def test_heads_of_different_budgets(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    sample = tasks.make("multi_key", 1, 120)
    heads = kept_positions(model, tokenizer, AdaKV(), sample, 0.5)["heads"]
    with Cache(model, AdaKV(), retention=0.5) as cache, torch.no_grad():
        tokens = torch.tensor([encode(tokenizer, sample.context, begins=True)])
        model.get_decoder()(tokens, past_key_values=cache, use_cache=True)
        expected = [
            row[:count].tolist()
            for layer in cache.ragged
            for row, count in zip(
                layer.rows.positions.tensor_split(layer.rows.cu_seqlens[1:-1].long().cpu()),
                layer.rows.lengths.flatten().tolist(),
                strict=True,
            )
        ]
    assert [head["positions"] for head in heads] == expected
    assert len({len(head["positions"]) for head in heads}) > 1
    assert sum(len(head["positions"]) for head in heads) == 6 * round(0.5 * 121)


def test_rows_of_each_sequence_of_a_batch(model: PreTrainedModel) -> None:
    """Padding in front counts in the positions; whole rows are all that is not padding."""
    ids, mask = torch.randint(3, 99, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :10] = 0
    with compress(model, ids, StreamingLLM(2), retention=0.2, attention_mask=mask) as cache:
        for sequence, expected in enumerate(([0, 1, *range(34, 40)], [10, 11, *range(36, 40)])):
            rows = kept_rows(cache, sequence)
            assert [[head.tolist() for head in layer] for layer in rows] == [[expected] * 2] * 3
    with Cache(model, StreamingLLM(), retention=1.0, chunks="last") as cache, torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model.get_decoder()(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        assert cache.ragged[0].rows is None
        for sequence, begin in enumerate((0, 10)):
            assert [x.tolist() for x in kept_rows(cache, sequence)[2]] == [list(range(begin, 40))] * 2
