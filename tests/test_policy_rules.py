"""Budgets of heads and layers worked out by hand, the published cases, and the order in which wrappers come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from observations import Given, observe, rows_of

from lkv.policies import (
    CAKE,
    CAOTE,
    AdaKV,
    CAKEScore,
    CriticalKV,
    DuoAttention,
    FastCAOTE,
    HeadKV,
    KVzip,
    LAVa,
    LAVaScore,
    Protect,
    PyramidKV,
    Random,
    SnapKV,
    SqueezeAttention,
    StreamingLLM,
)
from lkv.policies.cake import adjusted
from lkv.policies.lava import code_caps, entropies
from lkv.policies.squeeze import least_important
from lkv.policies.tables import load_table

STRONG = [0.30, 0.22, 0.15, 0.09, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005]
WEAK = [0.12, 0.11, 0.10, 0.08, 0.07, 0.06, 0.055, 0.045, 0.035, 0.025]


def test_the_published_example_of_adakv() -> None:
    """The blend of the authors and the minimum of kvpress, where they differ from each other by nothing."""
    scores = torch.tensor([[STRONG + [0.0, 0.0], WEAK + [0.0, 0.0]]])
    for floor in ("blend", "minimum"):
        policy = AdaKV(Given(scores, window=2), floor=floor)
        assert policy.budgets(scores, torch.tensor([[12, 12]]), torch.tensor([14])).tolist() == [[6, 8]]
    assert AdaKV() == AdaKV(SnapKV(32, 7, "max", group="mean", group_first=True), 0.2, "blend")


def test_lava_of_the_authors_keeps_more_than_its_budget_and_ours_does_not() -> None:
    """Ten rows a head on average, five of them the window: the heads win 4 and 6."""
    assert code_caps(torch.tensor([4, 6]), 10).tolist() == [5, 7]
    scores = torch.tensor([[STRONG + [0.0] * 5, WEAK + [0.0] * 5]])
    policy = LAVa(AdaKV(Given(scores, window=5), alpha=0.0), code=True)
    budgets = policy.budgets([scores], torch.full((1, 1, 2), 15), torch.tensor([20]), importance=torch.ones(1, 1))
    assert budgets.tolist() == [[[9, 11]]]


def test_lava_shares_by_entropy() -> None:
    scores = torch.tensor([[STRONG, WEAK]])
    everything = torch.ones_like(scores, dtype=torch.bool)
    assert float(entropies(scores, everything)) * 20 == pytest.approx(2.660905, abs=1e-5)
    peaked = torch.tensor([[[1.0] + [0.0] * 9, [1.0] + [0.0] * 9]])  # entropy log 2
    policy = LAVa(AdaKV(Given(scores), alpha=0.0))
    importance = torch.stack([policy.importance(0, rows_of(torch.zeros(2, 10, 2)), s) for s in (scores, peaked)])
    assert importance[1].item() * 20 == pytest.approx(0.693147, abs=1e-5)
    budgets = policy.budgets([scores, peaked], torch.full((2, 1, 2), 10), torch.tensor([12]), importance=importance)
    # 12 * 2.6609 / 3.3540 = 9.52 and 2.48 rows: by the largest remainder 10 and 2, those of all heads that are best.
    assert budgets.sum(2).tolist() == [[10], [2]] and budgets[1].tolist() == [[1, 1]]
    assert budgets[0].tolist() == [[4, 6]]


def test_cake_spreads_what_is_over_its_cap() -> None:
    assert adjusted([3.0, 1.0], 10, [6, 6]) == [6, 4]
    assert adjusted([1.0, 1.0, 1.0], 10, [9, 9, 9]) == [4, 3, 3]  # what rounding leaves, first ones first
    assert adjusted([8.0, 1.0, 1.0], 20, [6, 9, 9]) == [
        6,
        7,
        7,
    ]  # (16, 2, 2): ten are over
    divided = CAKE(CAKEScore(window=4)).divide([1.0, 3.0, 1.0], 20, torch.full((3, 2), 50))
    assert divided.tolist() == [7, 7, 6]  # less than the window: alike
    divided = CAKE(CAKEScore(window=4)).divide([1.0, 3.0, 1.0], 45, torch.full((3, 2), 50))
    assert divided.sum() == 45 and divided.tolist() == [8 + 4 + 1, 8 + 12, 8 + 4]
    assert adjusted([1.0, 0.0], 20, [6, 9]) == [6, 9] and adjusted([0.0, 0.0], 3, [6, 9]) == [2, 1]


def test_pyramids_keep_what_they_say() -> None:
    """32 layers, 128 rows, a window of 32: from 187.2 rows beside it to 4.8, where the authors' steps end at 33."""
    policy = PyramidKV(SnapKV(window=32))
    table = policy.layer_rows(32, torch.tensor([128, 128, 100]), torch.tensor([4096, 140, 150]))
    assert table[:2, 0].tolist() == [219, 213] and table[-1, 0] == 37 and table[:, 0].sum() == 128 * 32
    assert (table[:, 1] == 128).all()  # shorter than twice the rows beside the window
    # 68 rows beside the window of 118 at most: 118 to 18.
    assert table[0, 2] == 150 and table[-1, 2] == 50 and table[:, 2].sum() == 100 * 32
    assert PyramidKV(beta=1.0).layer_rows(4, torch.tensor([20]), torch.tensor([90])).flatten().tolist() == [20] * 4
    assert PyramidKV().layer_rows(1, torch.tensor([20]), torch.tensor([90])).tolist() == [[20]]
    whole = replace(policy, whole=True).layer_rows(32, torch.tensor([400]), torch.tensor([4000]))
    assert whole.flatten().tolist()[0] == 400  # the last layer would keep 20 rows, less than the window
    whole = PyramidKV(SnapKV(window=8), whole=True).layer_rows(3, torch.tensor([200]), torch.tensor([4000]))
    assert whole.flatten().tolist() == [390, 200, 10]
    edge = PyramidKV(SnapKV(window=8)).layer_rows(3, torch.tensor([28]), torch.tensor([40]))
    assert edge.flatten().tolist() == [40, 28, 16]  # of 20 rows beside the window twice as many are there
    with pytest.raises(ValueError, match="beta >= 1"):
        PyramidKV(beta=0.5)


def test_protection_comes_on_top_and_changes_no_score() -> None:
    o, snap = observe(40, 12, batch=1), SnapKV(window=4)
    policy = Protect(snap, sink=3, window=9)
    assert (policy.sink, policy.window, Protect(snap, sink=1).window) == (3, 9, 4)
    assert torch.equal(policy.score(0, o), snap.score(0, o.last_queries(4)))
    assert not torch.equal(policy.score(0, o), snap.score(0, o))
    assert AdaKV(policy).sink == 3 and AdaKV(policy).budgets(
        torch.zeros(1, 1, 40), torch.tensor([[40]]), torch.tensor([20])
    ).tolist() == [[20]]
    with pytest.raises(ValueError, match="lkv.Protect: expected a policy whose budgets are not known ahead, got Pyr"):
        Protect(PyramidKV(snap))
    with pytest.raises(ValueError, match="lkv.Protect: expected sink >= 0, got -1"):
        Protect(snap, sink=-1)


def test_scores_of_a_second_pass_are_not_changed() -> None:
    """They are made elsewhere: a wrapper that reads them while rows are observed would be ignored."""
    for wrapper in (CAOTE, FastCAOTE, LAVaScore):
        with pytest.raises(ValueError, match="expected a scorer that scores while a text is read, got KVzip"):
            wrapper(KVzip(across=None))
    assert AdaKV(Protect(KVzip(across=None), sink=9)).sink == 9


def test_rules_come_in_their_order() -> None:
    for outer in (CAOTE, lambda x: Protect(x, 1), PyramidKV, LAVa, CAKE):
        with pytest.raises(ValueError, match="expected a policy whose budgets are not known ahead, got PyramidKV"):
            outer(PyramidKV())
    assert LAVa(AdaKV(LAVaScore())).scope == "cascade" and LAVa(AdaKV(CriticalKV())).scope == "model"
    with pytest.raises(ValueError, match="lkv.AdaKV: expected a policy without budgets for layers, got PyramidKV"):
        AdaKV(PyramidKV())
    with pytest.raises(ValueError, match="lkv.AdaKV: expected a scorer of scope 'layer', got 'cascade'"):
        AdaKV(LAVa())
    both = PyramidKV(AdaKV(CAOTE(Protect(SnapKV(window=4), sink=2))))
    assert (both.sink, both.window, both.needs) == (2, 4, {"queries"})


TABLE = ((0.9, 0.1), (0.5, 0.3))


def test_headkv_shares_a_pool_by_a_table() -> None:
    """20 rows, 4 of them the window: of 16 twelve are in the pool of 48, shared 0.5, 0.0556, 0.278, 0.167."""
    policy = HeadKV(SnapKV(window=4), TABLE, beta=1.3)
    assert policy.budget_table(20, 100).tolist() == [[8 + 24, 8 + 3], [8 + 13, 8 + 8]]
    assert policy.ahead(1, torch.tensor([20]), torch.tensor([100])).tolist() == [[21, 16]]
    squared = replace(policy, temperature=2.0)  # of 48: 33.52, 0.41, 10.34, 3.72; largest remainders
    assert squared.budget_table(20, 100).tolist() == [[8 + 34, 8 + 0], [8 + 10, 8 + 4]]
    assert policy.budget_table(20, 24).sum() == 80 and policy.budget_table(20, 24).max() <= 24
    for wrong in ((), ((1.0, -1.0),), ((1.0, float("nan")),), ((1.0, float("inf")),), ((1.0,), (1.0, 2.0))):
        with pytest.raises(ValueError, match=r"lkv.HeadKV: expected a table \[layers\]\[heads\] of finite numbers"):
            HeadKV(table=wrong)


def test_duo_attention_pays_for_as_many_retrieval_heads_as_it_can() -> None:
    policy = DuoAttention(TABLE, sink=2, recent=8)
    assert policy.budget_table(25, 50).tolist() == [[50, 10], [30, 10]]
    assert policy.budget_table(8, 50).tolist() == [[8, 8], [8, 8]]
    assert policy.budget_table(50, 50).tolist() == [[50, 50], [50, 50]]
    assert policy.ahead(1, torch.tensor([25]), torch.tensor([50])).tolist() == [[30, 10]]


def test_tables_of_files(tmp_path) -> None:
    path = tmp_path / "table"
    path.write_text("0.9\t0.1\n0.5\t0.3\n")
    assert load_table(path) == TABLE
    path.write_text("[[0.9, 0.9, 0.0, 0.2], [0.4, 0.6, 0.3, 0.3]]")
    assert load_table(path, heads=2) == TABLE
    path.write_text('{"0-0": [0.8, 1.0], "0-1": [0.1], "1-1": [0.3], "1-0": [0.5]}')
    assert load_table(path) == TABLE
    for wrong in ("0.9 0.1\n0.5", "[]", "nan 1", '{"0": [1]}', "{"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"expected a table \[layers, heads\] of numbers in"):
            load_table(path)


def test_squeezed_layers_are_those_of_the_highest_cosines() -> None:
    """32 layers of which 18 are squeezed to 0.08 of 0.21: the others keep 0.377143 of a text."""
    cosines = [0.5] * 4 + [0.7] * 10 + [0.9 + n / 1000 for n in range(18)]
    assert least_important(cosines) == [False] * 14 + [True] * 18
    assert least_important([0.9, 0.1, 0.5]) == [True, False, False]
    assert least_important([0.1, 0.1, 0.2]) == [False] * 3 and least_important([]) == []
    policy = SqueezeAttention(p=0.08 / 0.21)
    totals = policy.divide(cosines, 32 * 2 * 2100, torch.full((32, 2), 10000))
    assert totals.sum() == 32 * 2 * 2100 and set(totals[14:].tolist()) == {1600}
    assert all(n in (7542, 7543) for n in totals[:14].tolist())  # 2 * 3771.43
    capped = policy.divide(cosines, 32 * 2 * 2100, torch.full((32, 2), 3000))
    assert set(capped[:14].tolist()) == {6000} and capped.sum() == 32 * 2 * 2100
    with pytest.raises(ValueError, match=r"p in \(0, 1\]"):
        SqueezeAttention(p=0.0)
    with pytest.raises(ValueError, match="expected the importance of all layers, got none"):
        policy.budgets([], torch.zeros(0, 1, 1, dtype=torch.long), torch.tensor([0]))


def test_streaming_and_random_go_with_every_rule() -> None:
    grid = [rule(scorer) for rule in (AdaKV, PyramidKV, LAVa) for scorer in (Random(), StreamingLLM())]
    assert len({repr(policy) for policy in grid}) == 6 and all(policy.needs == frozenset() for policy in grid)
