"""LKV as a policy of the cache: layer by layer, the table's rows, turn after turn."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from lkv.hf import Cache
from lkv.policies.lkv import LKV, Learned, LKVThreshold
from lkv.policies.lkv.checkpoint import Design, Shape


def make(model: PreTrainedModel, spread: float = 2, **design: object) -> Learned:
    torch.manual_seed(3)
    lkv = Design(hidden=8, **design).build(Shape.of(model))
    with torch.no_grad():
        lkv.budget.logits.mlp[2].weight.normal_(0, spread)
    return lkv


def rows(cache: Cache) -> torch.Tensor:
    return torch.stack([layer.rows.lengths[0] for layer in cache.ragged]).long()


@torch.no_grad()
@pytest.mark.parametrize("input", ["kv", "hidden"])
def test_a_prompt_is_evicted_layer_by_layer_to_the_table(model: PreTrainedModel, input: str) -> None:
    lkv = make(model, input=input)
    assert isinstance(lkv, LKV) and lkv.scope == "layer"
    with Cache(model, lkv, retention=0.3) as cache:
        whole = []
        for layer in cache.ragged:
            apply = layer.apply
            layer.apply = lambda *a, apply=apply: (
                whole.append(sum(x.keys is not None for x in cache.ragged)),
                apply(*a),
            )
        model.model(torch.randint(4, 400, (2, 100)), past_key_values=cache, use_cache=True)
        assert whole == [1, 1, 1]  # never two layers in full
        table = lkv.budget.table(6 * 30, 100, 12)
        assert torch.equal(rows(cache), table)
        assert table.min() < 0.6 * table.max()
        assert [sum(counts) for counts in zip(*(layer.row_counts for layer in cache.ragged), strict=True)] == [180, 180]


@torch.no_grad()
@pytest.mark.parametrize("input", ["kv", "hidden"])
def test_scores_are_those_of_the_scorer_whatever_was_evicted(model: PreTrainedModel, input: str) -> None:
    """In a second turn the same rows are worth the same: kept are the best of those that were there."""
    lkv, text = make(model, input=input), torch.randint(4, 400, (1, 90))
    with Cache(model, lkv, retention=0.5) as once:
        model.model(text, past_key_values=once, use_cache=True)
        once.evict(retention=0.25)
        with Cache(model, lkv, retention=0.25) as direct:
            model.model(text, past_key_values=direct, use_cache=True)
            for a, b in zip(once.ragged, direct.ragged, strict=True):
                assert torch.equal(a.rows.lengths, b.rows.lengths)
                for head in range(2):
                    kept = (x.rows.positions[x.rows.cu_seqlens[head] :][: x.rows.lengths[0, head]] for x in (a, b))
                    assert torch.equal(*kept)


@torch.no_grad()
def test_a_cap_is_of_all_layers_together(model: PreTrainedModel) -> None:
    lkv = make(model)
    with Cache(model, lkv, retention=0.5, cap=40, interval=8) as cache:
        model.model(torch.randint(4, 400, (1, 60)), past_key_values=cache, use_cache=True)
        evictions = 0
        for _ in range(60):
            before = sum(layer.row_counts[0] for layer in cache.ragged)
            model.model(torch.randint(4, 400, (1, 1)), past_key_values=cache, use_cache=True)
            after = sum(layer.row_counts[0] for layer in cache.ragged)
            evictions += after < before
            assert after <= 6 * 40
        assert 3 <= evictions <= 8
        assert int(rows(cache).sum()) == after


@torch.no_grad()
def test_a_threshold_budgets_by_the_text(model: PreTrainedModel) -> None:
    lkv = make(model, 0.2, budget="threshold")
    assert isinstance(lkv, LKVThreshold) and lkv.scope == "model"
    lengths = []
    for seed in (0, 1):
        text = torch.randint(4, 400, (1, 100), generator=torch.Generator().manual_seed(seed))
        with Cache(model, lkv, retention=0.3) as cache:
            model.model(text, past_key_values=cache, use_cache=True)
            lengths.append(rows(cache))
    assert not torch.equal(*lengths)
    assert int(lengths[0].sum()) == int(lengths[1].sum()) == 180


@torch.no_grad()
def test_texts_shorter_than_the_protected_rows_are_kept(model: PreTrainedModel) -> None:
    with Cache(model, make(model), retention=0.5) as cache:
        model.model(torch.randint(4, 400, (1, 8)), past_key_values=cache, use_cache=True)
        assert int(rows(cache).sum()) == 6 * 4
