"""Shares of an engine's layers: what LKV-H learned, in few classes of the same size, of the same total."""

from __future__ import annotations

import pytest
import torch

from lkv.policies.lkv import HeadBudget, Learned, TokenScorer, learned
from lkv.vllm.settings import Settings
from lkv.vllm.shares import STEP, multiples, of_model

LAYERS, HEADS = 12, 3


def make(kind: str = "capped", layers: int = LAYERS) -> Learned:
    torch.manual_seed(0)
    budget = HeadBudget(layers, HEADS, kind, dim=4, hidden=8)
    if budget.logits is not None:
        torch.nn.init.normal_(budget.logits.mlp[2].weight, std=4)
    return learned(TokenScorer(layers, HEADS, 8), budget)


@pytest.mark.parametrize("retention", [0.05, 0.15, 0.5, 1.0])
def test_heads_of_classes_keep_what_their_layers_keep_on_average(retention: float) -> None:
    lkv = make()
    with torch.no_grad():
        wanted = lkv.budget(retention).double()
    found = multiples(lkv, retention, "head", LAYERS, HEADS, classes=4)
    table = torch.tensor(found, dtype=torch.float64) * retention
    assert table.shape == (LAYERS, HEADS) and (table <= 1 + 1 / STEP).all()
    by_mean = wanted.mean(1).argsort(stable=True)
    for members in by_mean.split(3):
        assert len({found[i] for i in members.tolist()}) == 1
        mean = wanted[members].mean(0)
        assert ((table[members[0]] - mean).abs() <= retention * 0.5 / STEP + 1e-9)[mean > retention / STEP].all()
    assert abs(float(table.mean()) - retention) <= retention / STEP
    assert retention == 1 or len(set(found)) == 4


def test_layers_keep_the_mean_of_their_heads() -> None:
    lkv = make()
    with torch.no_grad():
        wanted = lkv.budget(0.15).double().mean(1)
    found = multiples(lkv, 0.15, "layer", LAYERS, HEADS, classes=12)
    assert all(len(row) == 1 for row in found)
    assert (torch.tensor(found)[:, 0] - wanted / 0.15).abs().max() <= 0.5 / STEP + 1e-6
    assert all((share * STEP).is_integer() for (share,) in found)


@pytest.mark.parametrize(
    ("layers", "classes", "sizes"), [(12, 5, [3] * 4), (30, 4, [10] * 3), (7, 4, [1, 2, 2, 2]), (2, 8, [1, 1])]
)
def test_classes_have_the_same_size_where_they_can(layers: int, classes: int, sizes: list[int]) -> None:
    found = multiples(make(layers=layers), 0.15, "head", layers, HEADS, classes)
    assert sorted(found.count(each) for each in set(found)) == sizes


def test_equal_counts_need_no_shares() -> None:
    for lkv in (None, make("threshold"), make()):
        assert multiples(lkv, 0.15, "equal", 5, HEADS) == [(1.0,)] * 5


def test_uniform_shares_are_one() -> None:
    assert multiples(make("uniform"), 0.15, "head", LAYERS, HEADS) == [(1.0,) * HEADS] * LAYERS


@pytest.mark.parametrize("counts", ["layer", "head"])
def test_what_has_no_shares_is_refused(counts: str) -> None:
    with pytest.raises(ValueError, match="expected counts 'equal' with a policy that has no shares"):
        multiples(None, 0.15, counts, LAYERS, HEADS)
    with pytest.raises(ValueError, match="depend on the text .kind 'threshold'.*--budget capped"):
        multiples(make("threshold"), 0.15, counts, LAYERS, HEADS)
    with pytest.raises(ValueError, match=r"expected shares of a model of \[5, 3\], got \[12, 3\]"):
        multiples(make(), 0.15, counts, 5, HEADS)


def test_ranks_have_the_same_shares() -> None:
    heads = Settings("knorm", 0.5, "head", shares=((0.5, 1.5, 0.5, 1.5), (1.0, 1.0, 1.0, 1.0)))
    assert of_model(heads, None, 2, 4) == list(heads.shares or ())
    assert of_model(heads, None, 2, 4, ranks=2) == [(0.5, 1.5), (1.0, 1.0)]
    with pytest.raises(ValueError, match=r"on each of 4 ranks, got \[0.5, 1.5, 0.5, 1.5\] in a layer: set counts"):
        of_model(heads, None, 2, 4, ranks=4)
    layers = Settings("knorm", 0.5, "layer", shares=((0.5,), (1.5,)))
    assert of_model(layers, None, 2, 4, ranks=4) == [(0.5,), (1.5,)]
    assert of_model(Settings("knorm", 0.5), None, 2, 4, ranks=2) == [(1.0,)] * 2
