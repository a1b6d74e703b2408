"""Policies that know something of every layer: of those that are evicted, where a model has others as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from families import HEADS, SLIDING, build, call, tokens, variant
from transformers import PreTrainedModel

import lkv
from lkv.offline import budget_curves, query_statistics
from lkv.policies import LUKV, AdaKV, DuoAttention, ExpectedAttention, HeadKV, KNorm, KVzap, Policy, Protect
from lkv.policies.expected_attention import QueryStatistics
from lkv.policies.kvzap import Gate
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.lukv import Curves

MODELS = ("all", "every second")  # of the layers are evicted, two of each model
SCORER = Protect(KNorm(), window=1)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build("qwen2") if request.param == "all" else variant("qwen2", use_sliding_window=True, **SLIDING)


def table(layers: int) -> tuple[tuple[float, ...], ...]:
    return tuple((1.0 + 3 * n, 2.0) for n in range(layers))


def curves(layers: int) -> Curves:
    return Curves(torch.linspace(0.01, 0.99, 99)[:, None, None].expand(99, layers, HEADS))


def gate(layers: int) -> Gate:
    return Gate(tuple(((torch.ones(HEADS, 32), torch.zeros(HEADS)),) for _ in range(layers)))


def statistics(layers: int) -> QueryStatistics:
    return QueryStatistics(torch.zeros(layers, 4, 8), torch.eye(8).expand(layers, 4, 8, 8))


def learned(layers: int) -> Policy:
    return Design().build(replace(Shape.of(build("qwen2")), layers=layers))


KNOWN: dict[str, Callable[[int], Policy]] = {
    "HeadKV": lambda n: HeadKV(SCORER, table(n)),
    "DuoAttention": lambda n: DuoAttention(table(n), sink=1, recent=3),
    "LUKV": lambda n: LUKV(SCORER, curves(n)),
    "KVzap": lambda n: AdaKV(KVzap(gate(n), window=2)),
    "ExpectedAttention": lambda n: Protect(ExpectedAttention(statistics=statistics(n)), window=2),
    "LKV": learned,
}


@pytest.mark.parametrize("layers", [1, 3, 4])
@pytest.mark.parametrize("known", KNOWN)
def test_more_or_fewer_layers_are_refused(model: PreTrainedModel, known: str, layers: int) -> None:
    policy, message = KNOWN[known](layers), f"of 2 layers, .*, got {layers}$"
    with pytest.raises(ValueError, match=message):
        lkv.Cache(model, policy, retention=0.5)
    cache = lkv.Cache(model, "snapkv", retention=1.0, observe=policy.needs)
    with torch.no_grad():
        call(model, tokens(1, 40), None, cache)
    with pytest.raises(ValueError, match=message):
        cache.evict(policy, retention=0.5)
    assert [layer.row_counts for layer in cache.ragged] == [[40 * HEADS]] * 2


@pytest.mark.parametrize("known", KNOWN)
def test_what_is_known_is_of_the_layers_that_are_evicted(model: PreTrainedModel, known: str) -> None:
    policy = KNOWN[known](2)
    cache = lkv.Cache(model, policy, retention=0.5)
    with torch.no_grad():
        call(model, tokens(1, 40), None, cache)
    counts = torch.stack([layer.rows.lengths[0] for layer in cache.ragged])
    assert int(counts.sum()) == 20 * HEADS * 2
    if known in ("HeadKV", "DuoAttention", "LUKV"):
        assert torch.equal(counts.long(), policy.budget_table(20, 40))


def test_what_is_collected_of_a_model_is_known_of_it(model: PreTrainedModel) -> None:
    texts = [tokens(1, 40, seed) for seed in (1, 2)]
    for policy in (
        LUKV(SCORER, budget_curves(model, texts, SCORER)),
        ExpectedAttention(statistics=query_statistics(model, texts)),
    ):
        cache = lkv.Cache(model, policy, retention=0.3)
        with torch.no_grad():
            call(model, tokens(1, 40), None, cache)
        assert sum(layer.row_counts[0] for layer in cache.ragged) == 12 * HEADS * 2
