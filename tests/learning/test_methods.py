"""The methods that are compared: which policy a name stands for, and what the grid exchanges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import tasks
from lkv.evaluate.methods import FLOOR, FULL, Method, choose, heuristics, learned
from lkv.evaluate.run import Setting, evaluate
from lkv.hf import Cache
from lkv.policies.adakv import AdaKV
from lkv.policies.catalog import COMPARED
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv import LKV, Learned
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.lkv.head_budget import KINDS
from lkv.policies.random import Random
from lkv.policies.snapkv import SnapKV
from lkv.policies.streaming_llm import StreamingLLM

FIXED = ("capped", "softmax")  # kinds of budgets with learned shares
GRID = ("uniform+lkv-t", "lkv-h+snapkv", "lkv-h+kvzip", "uniform+kvzip")


@pytest.fixture
def lkv(model: PreTrainedModel) -> Learned:
    torch.manual_seed(5)
    policy = Design(hidden=8, sink=3, window=5).build(Shape.of(model))
    for parameter in policy.budget.logits.parameters():
        torch.nn.init.normal_(parameter)  # as built, all heads are equal
    return policy


def test_heuristics_are_what_their_names_say() -> None:
    known = {
        "random": Random(),
        "streaming_llm": StreamingLLM(),
        "snapkv": SnapKV(),
        "adakv": AdaKV(),
        "kvzip": KVzip(across="layers"),
    }
    assert heuristics().keys() >= known.keys() == set(COMPARED)
    assert {name: heuristics()[name] for name in known} == known


def test_methods_come_in_the_order_of_their_names() -> None:
    known = heuristics()
    assert choose(["snapkv", FULL, "random", FLOOR], known) == [
        Method("snapkv", SnapKV()), Method(FULL, None), Method("random", Random()), Method(FLOOR, None),
    ]  # fmt: skip
    assert choose([], known) == []
    assert choose(["streaming"], known) == [Method("streaming_llm", StreamingLLM())]  # as reports had it before


def test_unknown_methods_are_refused(lkv: Learned) -> None:
    known = heuristics() | learned(lkv)
    with pytest.raises(ValueError, match="expected methods of full, floor, random, .* got 'h3o'"):
        choose(["snapkv", "h3o"], known)
    with pytest.raises(ValueError, match="expected methods of full, floor, random, .* got 'lkv'"):
        choose(["lkv"], heuristics())


def test_scorer_and_second_pass(lkv: Learned) -> None:
    known = heuristics() | learned(lkv)
    scorers = {name: Method(name, policy).scorer for name, policy in known.items()}
    assert (
        scorers["adakv"] == AdaKV().scorer
        and scorers["kvzip"] == KVzip()
        and scorers["lkv-h+kvzip"] == KVzip(across=None)
    )
    assert scorers["lkv"] is lkv  # a scorer that is no policy of its own
    assert {name for name, policy in known.items() if Method(name, policy).second_pass} == {
        "kvzip", "uniform+kvzip", "lkv-h+kvzip",
    }  # fmt: skip
    assert not Method(FULL, None).second_pass and Method(FULL, None).scorer is None


def test_identity_is_of_settings_and_weights(model: PreTrainedModel) -> None:
    """The same in every process, and another one for whatever would keep other rows."""

    def built(seed: int = 5, **design: object) -> str:
        torch.manual_seed(seed)
        return Method("lkv", Design(hidden=8, **design).build(Shape.of(model))).identity

    others = [built(6), built(sink=3), built(budget="threshold"), built(scale="absolute"), built(floor=0.1)]
    found = [built(), *others, *(Method(name, policy).identity for name, policy in heuristics().items())]
    found += [Method("", x).identity for x in (SnapKV(window=8), AdaKV(SnapKV(kernel_size=7)), KVzip(across=None))]
    assert len(set(found)) == len(found) and built() == found[0]
    assert Method("full", None).identity == "None"

    class Outside:
        def __init__(self, width: int) -> None:
            self.width = width

    assert Method("", Outside(3)).identity == Method("", Outside(3)).identity != Method("", Outside(4)).identity
    assert not any("0x" in x for x in [*found, Method("", Outside(3)).identity])


def test_grid_exchanges_one_half_each(lkv: Learned) -> None:
    grid = learned(lkv)
    assert set(grid) == {"lkv", *GRID}
    assert grid["lkv"] is lkv
    equal = grid["uniform+lkv-t"]
    assert equal.scorer is lkv.scorer and equal.budget.kind == "uniform"
    assert (equal.sink, equal.window) == (lkv.sink, lkv.window) == (3, 5)
    # Protected rows are those of the method whose scores they are.
    for name, scorer in (("lkv-h+snapkv", SnapKV()), ("lkv-h+kvzip", KVzip(across=None))):
        policy = grid[name]
        assert isinstance(policy, LKV) and policy.scorer == scorer and policy.budget is lkv.budget
        assert (policy.sink, policy.window) == (scorer.sink, scorer.window)
    assert grid["uniform+kvzip"] == KVzip(across=None)


def test_variants_come_on_top(lkv: Learned) -> None:
    other = replace(lkv, sink=0)
    grid = learned(lkv, {"mine": other})
    assert grid["mine"] is other and set(grid) == {"lkv", *GRID, "mine"}


@pytest.mark.parametrize("kind", ["threshold", "uniform"])
def test_shares_are_those_of_the_first_checkpoint_that_has_some(
    model: PreTrainedModel, lkv: Learned, kind: str
) -> None:
    without = Design(budget=kind, hidden=8).build(Shape.of(model))
    assert "lkv-h+snapkv" not in learned(without) and "lkv-h+kvzip" not in learned(without, {"too": without})
    grid = learned(without, {"too": without, "mine": lkv, "other": replace(lkv, sink=0)})
    for name in ("lkv-h+snapkv", "lkv-h+kvzip"):
        assert isinstance(grid[name], LKV) and grid[name].budget is lkv.budget, name
    assert grid["lkv"] is without and grid["uniform+lkv-t"].scorer is without.scorer


@pytest.mark.parametrize("kind", KINDS)
def test_grid_of_every_kind_of_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal budgets, every head keeps as much as every other; with learned ones, not."""
    torch.manual_seed(5)
    lkv = Design(budget=kind, hidden=8).build(Shape.of(model))
    if lkv.budget.logits is not None:
        for parameter in lkv.budget.logits.parameters():
            torch.nn.init.normal_(parameter)
    sizes: list[set[int]] = []

    def evicted(model: object, cache: Cache, *rest: object) -> list[list[int]]:
        sizes.append({n for layer in cache.ragged for n in layer.rows.lengths.flatten().tolist()})
        return [[]]

    monkeypatch.setattr("lkv.evaluate.run.answer", evicted)
    samples = [tasks.make("single", 0, 100)]
    known = learned(lkv)
    assert [name for name in GRID if name in known] == (
        list(GRID) if kind in FIXED else ["uniform+lkv-t", "uniform+kvzip"]
    )
    methods = choose(["lkv", *(name for name in GRID if name in known)], known)
    results = list(evaluate(model, tokenizer, samples, methods, Setting((0.4,), batch=1, limit=1)))
    for result, kept in zip(results, sizes, strict=True):
        assert result.kept == pytest.approx(0.4, abs=0.005), result.method
        equal = "uniform" in result.method or (kind == "uniform")
        assert (len(kept) == 1) == equal, (result.method, kept)
