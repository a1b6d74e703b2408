"""Layers that shrink while later ones come keep the rows of one plan for all layers, and never hold many more."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import pytest
import torch
import transformers
from families import SMALL, call, tokens
from torch import Tensor
from transformers import PreTrainedModel

import lkv
from lkv.hf.cascade import within
from lkv.policies import CAKE, AcrossLayers, AdaKV, CAKEScore, LAVa, LAVaScore, Observation, SnapKV
from lkv.policies.base import LayerWrapper

LAYERS, LENGTH = 6, 60
SCORE = SnapKV(window=4, kernel_size=3, pooling="max", group="max")
POLICY = LAVa(AdaKV(LAVaScore(SCORE, before=False), alpha=0.0))
POLICIES = {
    "lava": POLICY,
    "lava, some rows sure": LAVa(AdaKV(LAVaScore(SCORE), alpha=0.3)),
    "lava, the best rows sure": LAVa(AdaKV(LAVaScore(SCORE), alpha=0.3, floor="minimum")),
    "lava, authors' code": LAVa(AdaKV(LAVaScore(SCORE, before=True), alpha=0.0), code=True),
    "cake": CAKE(CAKEScore(window=4), tau1=1.6, tau2=0.4),
    "across layers": AcrossLayers(SCORE),
    "cake of adakv": CAKE(AdaKV(CAKEScore(window=4), alpha=0.2)),
}


def together(policy: LayerWrapper) -> LayerWrapper:
    """The same for all layers at once."""

    class Together(type(policy)):
        scope = "model"

    return Together(**{field.name: getattr(policy, field.name) for field in fields(policy)})


@lru_cache
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    options = dict(SMALL, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    for n, layer in enumerate(made.model.layers):  # so that entropies differ
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.2 + 0.25 * ((5 * n) % LAYERS))
    return made.eval()


def kept(cache: lkv.Cache, b: int) -> list[list[int]]:
    rows = [layer.rows.padded(layer.rows.positions)[b].tolist() for layer in cache.ragged]
    counts = [layer.rows.lengths[b].tolist() for layer in cache.ragged]
    return [head[:n] for heads, each in zip(rows, counts, strict=True) for head, n in zip(heads, each, strict=True)]


def padded(batch: int) -> Tensor:
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    for b in range(1, batch):
        mask[b, : 9 * b] = 0
    return mask


@pytest.mark.parametrize("retention", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("batch, name", [(1, name) for name in POLICIES] + [(3, "lava"), (3, "cake of adakv")])
@torch.no_grad()
def test_the_rows_are_those_of_one_plan(batch: int, name: str, retention: float) -> None:
    """Padding, a later turn that finds heads of different rows, and tokens that are generated."""
    assert POLICIES[name].scope == "cascade"
    caches = [lkv.Cache(model(), x, retention=retention) for x in (POLICIES[name], together(POLICIES[name]))]
    mask = padded(batch)
    for turn, count in enumerate((LENGTH, 1, 17, 1)):
        if turn:
            mask = torch.cat([mask, torch.ones(batch, count, dtype=torch.long)], 1)
        ids = tokens(batch, count, turn)
        first, second = (call(model(), ids, mask, cache) for cache in caches)
        if turn < 2:
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
        if turn == 0 and retention < 1:
            for b in range(batch):
                assert kept(caches[0], b) == kept(caches[1], b)
                assert sum(map(len, kept(caches[0], b))) == round(retention * int(mask[b].sum())) * 2 * LAYERS
    for cache in caches:
        rows = [sum(layer.row_counts[b] for layer in cache.ragged) for b in range(batch)]
        expected = [(round(retention * (int(n) - 1)) + 1) * 2 * LAYERS for n in mask.sum(1)]
        assert rows == expected
        assert not any(layer.due for layer in cache.ragged)


@dataclass(frozen=True)
class OneHead(SnapKV):
    """The rows of the first head are worth more than all others."""

    def score(self, layer: int, observation: Observation) -> Tensor:
        scores = super().score(layer, observation)
        scores[:, 0] += 1
        return scores


@pytest.mark.parametrize("seed", range(20))
def test_budgets_above_what_is_there_go_to_other_heads(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    budgets, there = (torch.randint(0, 9, (3, 2, 4), generator=draw) for _ in range(2))
    found = within(budgets, there)
    assert found.shape == there.shape and bool((found >= 0).all() and (found <= there).all())
    totals = budgets.sum((0, 2)).minimum(there.sum((0, 2)))
    assert torch.equal(found.sum((0, 2)), totals)
    assert torch.equal(within(budgets.minimum(there), there), budgets.minimum(there))


@torch.no_grad()
def test_a_head_that_wins_all_does_so_against_rows_that_are_gone() -> None:
    """It keeps fewer than it has won, as others are sure of some: of a smaller total it would win fewer of its rows."""
    policy, ids = LAVa(AdaKV(OneHead(window=4), alpha=0.5)), tokens(1, LENGTH)
    caches = [lkv.Cache(model(), x, retention=0.3) for x in (policy, together(policy))]
    for cache in caches:
        call(model(), ids, None, cache)
    assert kept(caches[0], 0) == kept(caches[1], 0)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_memory_is_the_budget_and_one_layer(name: str) -> None:
    """Counted when a layer has come, which is the peak; in one plan all layers are whole then."""
    peaks: dict[str, list[int]] = {}

    def watched(way: str, policy: LayerWrapper) -> None:
        class Watched(type(policy)):
            def score(self, layer: int, observation: Observation) -> Tensor:
                rows = [
                    sum(counts) for counts in zip(*(x.row_counts for x in cache.ragged if x.row_counts), strict=True)
                ]
                peaks.setdefault(way, []).append(max(rows))
                return super().score(layer, observation)

        watching = Watched(**{field.name: getattr(policy, field.name) for field in fields(policy)})
        cache = lkv.Cache(model(), watching, retention=0.2)
        call(model(), tokens(1, LENGTH), None, cache)

    policy = POLICIES[name]
    whole, total = LENGTH * 2, round(0.2 * LENGTH) * 2 * LAYERS
    watched("cascade", policy)
    assert max(peaks["cascade"]) <= total + whole + getattr(policy, "slack", 1) * 2 * LAYERS
    watched("together", together(policy))
    assert max(peaks["together"]) == LAYERS * whole > max(peaks["cascade"])


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing() -> None:
    """In the middle of a cascade; the next call is as if it had not been."""
    ids = tokens(1, LENGTH)
    expected = lkv.Cache(model(), POLICY, retention=0.2)
    call(model(), ids, None, expected)
    cache = lkv.Cache(model(), POLICY, retention=0.2)

    def fail(*args: object) -> None:
        raise RuntimeError("in the middle")

    handle = model().model.layers[4].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        call(model(), tokens(1, LENGTH, 3), None, cache)
    handle.remove()
    assert cache.get_seq_length() == 0
    call(model(), ids, None, cache)
    assert kept(cache, 0) == kept(expected, 0)


@torch.no_grad()
def test_where_it_waits_all_layers_are_divided_among_at_once() -> None:
    ids = tokens(1, LENGTH)
    expected = lkv.Cache(model(), POLICY, retention=0.2)
    call(model(), ids, None, expected)
    cache = lkv.Cache(model(), POLICY, retention=0.2, chunks="last")
    with cache.prefill():
        for piece in ids.split([25, 35], 1):
            call(model(), piece, None, cache)
    assert kept(cache, 0) == kept(expected, 0)
