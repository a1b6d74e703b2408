"""Cases worked out by hand for every method, and the published ones: what is kept, not how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from observations import D, H, observe
from torch import Tensor

import lkv_ext
from lkv.policies import (
    CAKE,
    CAOTE,
    H2O,
    SAGEKV,
    TOVA,
    AdaKV,
    CAKEScore,
    Compactor,
    CriticalKV,
    DefensiveScore,
    DuoAttention,
    ExpectedAttention,
    FastCAOTE,
    HeadKV,
    KeyDiff,
    KNorm,
    KVzip,
    LagKV,
    LAVa,
    LAVaScore,
    Leverage,
    Observation,
    Protect,
    PyramidKV,
    QueryStatistics,
    Random,
    Scorer,
    SnapKV,
    SqueezeAttention,
    StreamingLLM,
)
from lkv.policies.attention import attention_weights
from lkv.policies.cake import adjusted
from lkv.policies.criticalkv import projected_norms
from lkv.policies.lava import code_caps, entropies, lava_code
from lkv.policies.squeeze import least_important
from lkv.policies.tables import load_table

STRONG = [0.30, 0.22, 0.15, 0.09, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005]
WEAK = [0.12, 0.11, 0.10, 0.08, 0.07, 0.06, 0.055, 0.045, 0.035, 0.025]


@dataclass(frozen=True)
class Given(Scorer):
    """Scores as they are given."""

    scores: Tensor
    sink: int = 0
    window: int = 0

    nonnegative = True

    def score(self, layer: int, observation: Observation) -> Tensor:
        return self.scores.clone()


def rows_of(keys: Tensor, values: Tensor | None = None, **more: object) -> Observation:
    """One sequence, `[H, L, D]`, no padding."""
    keys = keys[None]
    heads, length = keys.shape[1:3]
    return Observation(
        keys=keys,
        values=keys if values is None else values[None],
        positions=torch.arange(length).expand(1, heads, length),
        lengths=torch.full((1, heads), length),
        starts=torch.zeros(1, heads, dtype=torch.long),
        **more,
    )


def attending(logits: Sequence[Sequence[float]]) -> Observation:
    """One KV head: queries `[G]` at its end whose logits are those given, `[G][L]`."""
    group, length = len(logits), len(logits[0])
    queries = torch.eye(group)[None, :, None]
    keys = torch.tensor(logits).T[None]
    return rows_of(
        keys, queries=queries, query_positions=torch.tensor([[length - 1]]), query_mask=torch.ones(1, 1).bool()
    )


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


def test_lava_weighs_heads_by_their_largest_value() -> None:
    o = observe(20, 4, batch=1)
    base = SnapKV(4, 3, "max", group="max")
    largest = o.values.abs().sum(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(LAVaScore(base).score(0, o), base.score(0, o) * largest)
    o.values[0, 1, 18] = 100.0  # in the window
    assert float((LAVaScore(base).score(0, o) / base.score(0, o))[0, 1, 0]) == pytest.approx(100 * D)
    assert float((LAVaScore(base, before=True).score(0, o) / base.score(0, o))[0, 1, 0]) < 100
    first = replace(base, group_first=True)  # a maximum commutes with a maximum
    torch.testing.assert_close(first.score(0, o), base.score(0, o))
    assert lava_code().scorer.scorer.before and not LAVa().scorer.scorer.before


def test_caote_is_what_the_output_changes_by() -> None:
    a = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    v = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [2, -1]]])
    o = rows_of(torch.zeros(1, 4, 2), v)
    expected = torch.tensor([[[0.471699, 0.411629, 0.114706, 0.098781]]])
    torch.testing.assert_close(CAOTE(Given(a * 7)).score(0, o), expected, rtol=1e-4, atol=1e-5)
    for row in range(4):
        rest = a[0, 0].clone()
        rest[row] = 0
        change = (a[0, 0] @ v[0] - rest / rest.sum() @ v[0]).norm()
        assert float(change) == pytest.approx(float(expected[0, 0, row]), rel=1e-4)
    sure = torch.tensor([[[0.95, 0.05, 0.0, 0.0]]])  # 19 times the distance of (1, 0) to (0.95, 0.05)
    assert float(CAOTE(Given(sure)).score(0, o)[0, 0, 0]) == pytest.approx(19 * 0.05 * 2**0.5, rel=1e-4)
    fast = torch.tensor([[[0.25, 0.535714, 0.132353, 0.084252]]])
    torch.testing.assert_close(FastCAOTE(Given(a)).score(0, o), fast, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="lkv.CAOTE: expected a scorer whose scores are weights"):
        CAOTE(KNorm())


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


def test_cake_scores_by_mean_and_variance() -> None:
    """Two queries, weights (.5, .5) and (.9, .1) on two rows before them, and nothing on their own rows."""
    o = rows_of(torch.zeros(1, 4, 2))
    one = torch.tensor([[0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0]])
    far = -1e4
    keys = torch.tensor([[[0.0, 0.0]], [[0.0, -2.1972246]], [[far, far]], [[far, far]]]).transpose(0, 1)
    o = replace(
        o, keys=keys[None], queries=torch.eye(2)[None, None], query_positions=torch.tensor([[2, 3]]),
        query_mask=torch.ones(1, 2).bool(),
    )  # fmt: skip
    expected = one.mean(0) + 5 * one.var(0)
    score = CAKEScore(window=2, gamma=5.0, kernel_size=1).score(0, o)[0, 0]
    torch.testing.assert_close(score[:2], expected[:2], rtol=1e-4, atol=1e-5)
    assert score[2:].tolist() == [0, 0]
    dispersion = torch.special.entr(one[:, :2]).sum()
    shift = one[:, :2].var(0).sum()
    policy = CAKE(CAKEScore(window=2), tau1=2.0, tau2=0.5)
    assert float(policy.importance(0, o, score[None, None])) == pytest.approx(
        float(dispersion**0.5 * shift**2), rel=1e-3
    )


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


def test_keys_of_a_small_norm_and_keys_unlike_the_others() -> None:
    keys = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]])
    assert KNorm().score(0, rows_of(keys)).tolist() == [[[-5.0, -1.0, -2.0]]]
    assert KNorm().score(0, rows_of(keys.bfloat16())).dtype == torch.float32
    directions = torch.nn.functional.normalize(keys[0], dim=-1)
    mean = directions.mean(0) / directions.mean(0).norm()
    torch.testing.assert_close(KeyDiff().score(0, rows_of(keys))[0, 0], -directions @ mean)


def test_tova_averages_over_all_heads_of_a_layer() -> None:
    o = observe(9, 3, batch=1)
    score = TOVA().score(0, o)
    one = SnapKV(window=1, kernel_size=1)
    last = o.last_queries(1)
    mean = torch.stack([one.score(0, last)[0, h] for h in range(H)]).mean(0)
    for h in range(H):
        torch.testing.assert_close(score[0, h, :8], mean[:8])
    # As if heads held different rows: they are known by their positions.
    rows = torch.tensor([[0, 2, 5, 8], [0, 3, 5, 8], [1, 2, 5, 8]])
    take = rows[None, ..., None].expand(-1, -1, -1, D)
    ragged = replace(
        o, keys=o.keys.gather(2, take), values=o.values.gather(2, take), positions=rows[None].contiguous(),
        lengths=torch.full((1, H), 4),
    )  # fmt: skip
    own = torch.stack([replace(one, window=1).score(0, ragged.last_queries(1))[0, h] for h in range(H)]) / H
    got = TOVA().score(0, ragged)[0]
    torch.testing.assert_close(got[0, 0], own[0, 0] + own[1, 0])
    torch.testing.assert_close(got[1, 1], own[1, 1])
    torch.testing.assert_close(got[2, 1], own[0, 1] + own[2, 1])
    torch.testing.assert_close(got[:, 2], own[:, 2].sum().expand(3))


def test_lagkv_ranks_rows_against_the_next_piece() -> None:
    """Pieces of two behind a sink of one; keys and values alike. Spreads of (x - min) / (max - min) decide."""
    rows = torch.tensor([[9.0, 9], [0, 1], [2, 2], [0, 0], [1, 2], [5, 5], [6, 6], [7, 7]])[None]
    score = LagKV(sink=1, lag=2).score(0, rows_of(rows))[0, 0].tolist()
    # Rows 1, 2 against (0, 0) to (1, 2): (0, .5) and (2, 1), spreads .35 and .71. Rows 3, 4 against (5, 5) to (6, 6):
    # (-5, -5) and (-4, -3), spreads 0 and .71. Rows 5, 6 have no next piece, row 7 is left over.
    assert score == [1.0, 0.0, 0.5, 0.0, 0.5, 1.0, 1.0, 1.0]
    cross = LagKV(sink=1, lag=2, cross=True).score(0, rows_of(rows))[0, 0]
    spread = torch.tensor([[0.5, 1.0], [0.0, 1.0]]) / 2**0.5
    torch.testing.assert_close(cross[1:5], spread.softmax(-1).flatten())
    short = LagKV(sink=1, lag=4).score(0, rows_of(rows))[0, 0]  # less than two pieces: the last rows
    torch.testing.assert_close(short, torch.tensor([1.0, *[n / 7 for n in range(7)]]))


def test_sagekv_takes_the_best_rows_of_every_query_head() -> None:
    """Eight rows of a budget of eight among twelve: two at either end; four of the middle, two for each query head."""
    first = [0.0, 0, 9, 8, 7, 6, 1, 1, 1, 1, 0, 0]
    second = [0.0, 0, 1, 1, 1, 1, 6, 7, 8, 9, 0, 0]
    same = [0.0, 0, 9, 8, 7, 6, 1, 1, 1, 1, 0, 0]

    def kept(group: str, *logits: list[float]) -> list[int]:
        policy, o = SAGEKV(group), attending(logits)
        budgets = torch.tensor([[8]])
        scores = policy.refine(0, o, policy.score(0, o), budgets)
        options = dict(sink=policy.sink, window=policy.window)
        return lkv_ext.select(scores, budgets, **options).positions.tolist()

    assert kept("union", first, second) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert kept("union", first, same) == [0, 1, 2, 3, 4, 5, 10, 11]  # what heads agree on pays for their next best
    assert kept("union", [x / 9 for x in first], second) == [0, 1, 2, 3, 8, 9, 10, 11]  # ranks, whatever the logits are
    with pytest.raises(ValueError, match="group 'union', 'max' or 'sum'"):
        SAGEKV("mean")


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
    assert policy.budget_table(20, 24).sum() == 80 and policy.budget_table(20, 24).max() <= 24
    with pytest.raises(ValueError, match="expected a table with a row for layer 2, got one of 2 layers"):
        policy.ahead(2, torch.tensor([20]), torch.tensor([100]))
    with pytest.raises(ValueError, match=r"lkv.HeadKV: expected a table \[layers\]\[heads\]"):
        HeadKV()


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


def test_heavy_hitters_are_summed_and_recent_rows_are_half() -> None:
    """All queries of a text: in blocks they are what they are together."""
    o = observe(300, 300, batch=1, heads=1, group=2)
    weights = attention_weights(o, 0)
    torch.testing.assert_close(H2O().score(0, o)[0, 0], weights.sum(2).mean(1)[0])
    torch.testing.assert_close(
        H2O(average=True).score(0, o)[0, 0], weights.sum(2).mean(1)[0] / torch.arange(300, 0, -1)
    )
    scores = H2O().refine(0, o, torch.zeros(1, 1, 300), torch.tensor([[41]]))
    assert scores.isinf().nonzero()[:, 2].tolist() == list(range(280, 300))
    missing = replace(o, query_mask=torch.arange(300)[None] >= 100)
    torch.testing.assert_close(H2O().score(0, missing)[0, 0], weights[:, :, 100:].sum(2).mean(1)[0])
    some = H2O(average=True).score(0, missing)[0, 0]
    seen = torch.minimum(torch.arange(300, 0, -1), torch.tensor(200))
    torch.testing.assert_close(some, weights[:, :, 100:].sum(2).mean(1)[0] / seen)


def test_half_of_a_critical_budget_is_by_projected_norms() -> None:
    """Six rows: two protected, one the scorer's best, three by score times norm."""
    values = torch.ones(1, 8, 2)
    values[0, 5] = 30
    values[0, 1] = -20
    weight = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 2], [1, 1, 1, 1]])
    o = replace(rows_of(torch.zeros(1, 8, 2), values), output_projection=weight)
    # Query heads give (v0, v1, v0 + v1) and (2 v0, 2 v1, v0 + v1): 4 and 6 for a row of ones.
    torch.testing.assert_close(projected_norms(o)[0, 0], torch.tensor([5.0, 100, 5, 5, 5, 150, 5, 5]))
    scores = torch.tensor([[[0.0, 0.01, 0.3, 0.2, 0.25, 0.02, 0.1, 0.0]]])
    policy = CriticalKV(Given(scores, sink=1, window=1))
    got = policy.refine(0, o, scores.clone(), torch.tensor([[6]]))[0, 0]
    assert got.isinf().nonzero().flatten().tolist() == [2]
    torch.testing.assert_close(got[[1, 4, 5]], (scores[0, 0, [1, 4, 5]] + 1e-4) * torch.tensor([100.0, 5, 150]))
    kept = lkv_ext.select(got[None, None], [6], sink=1, window=1).positions.tolist()
    assert kept == [0, 1, 2, 4, 5, 7]
    assert policy.refine(0, o, scores.clone(), torch.tensor([[8]]))[0, 0].isinf().sum() == 2


@dataclass(frozen=True)
class Still:
    """A rotary embedding by angles per position, half of the head against the other."""

    angles: Tensor
    length: int

    def _at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        turned = places[..., None].float() * self.angles
        return turned.cos().repeat(*[1] * places.dim(), 2), turned.sin().repeat(*[1] * places.dim(), 2)

    def undo(self, rows: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self._at(positions[:, None])
        first, second = rows.chunk(2, -1)
        return rows * cos - torch.cat([-second, first], -1) * sin

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        return self._at((self.length + torch.arange(count))[None])


@pytest.mark.parametrize("statistics", [False, True])
def test_expected_attention_by_numbers(statistics: bool) -> None:
    """The mean of the rotated normal queries, one position at a time."""
    o = observe(30, 30, batch=1, heads=2, group=2)
    rotary = Still(torch.tensor([1.0, 0.5, 0.1, 0.01]), 30)
    o = replace(o, rotary=rotary)
    before = rotary.undo(o.queries, o.query_positions)[0, :, 4:].double()
    mean = before.mean(1)
    spread = torch.stack([(q - m).T @ (q - m) / len(q) for q, m in zip(before, mean, strict=True)])
    turn = torch.stack([-rotary.undo(-torch.eye(8)[None, None], torch.full((1, 8), -p))[0, 0] for p in range(30, 50)])
    turn = turn.mean(0).T.double()
    expected = torch.zeros(2, 30, dtype=torch.float64)
    for h in range(2):
        keys, norms = o.keys[0, h, 4:].double(), o.values[0, h, 4:].double().norm(dim=-1)
        for q in (2 * h, 2 * h + 1):
            m, s = turn @ mean[q], turn @ spread[q] @ turn.T
            logits = 0.7 * keys @ m + 0.7**2 * torch.einsum("li,ij,lj->l", keys, s, keys) / 2
            expected[h, 4:] += (logits.softmax(0)) * norms / 2
    policy = ExpectedAttention(future=20)
    if statistics:
        policy = replace(policy, statistics=QueryStatistics(mean[None].float(), spread[None].float()))
        assert policy.needs == {"rotary"}
        o = replace(o, queries=None)
    torch.testing.assert_close(policy.score(0, o)[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_leverage_of_keys() -> None:
    o = observe(40, 40, batch=2)
    got = Leverage(sink=3, window=2, ridge=0.5).score(0, o)
    raw = torch.zeros(2, H, 35, dtype=torch.float64)
    for b in range(2):
        for h in range(H):
            x = o.pre_rope_keys[b, h, 3:38].double()
            x = x - x.mean(0)
            raw[b, h] = (x @ torch.linalg.inv(x.T @ x + 0.5 * torch.eye(D).double()) @ x.T).diagonal()
        raw[b] = (raw[b] - raw[b].mean()) / raw[b].std()
    torch.testing.assert_close(got[:, :, 3:38].double(), raw, rtol=1e-3, atol=1e-3)
    assert (got[:, :, :3] == 0).all() and (got[:, :, 38:] == 0).all()
    both = Compactor(3, 2, 0.5, blending=0.3, piece=16)
    received = both.score(0, o) - 0.3 * got
    torch.testing.assert_close(replace(both, blending=0.0).score(0, o), received, rtol=1e-4, atol=1e-4)
    evicted = replace(both, blending=None).score(0, replace(o, budget=torch.tensor([28, 20])))
    torch.testing.assert_close(evicted - received, got * torch.tensor([0.3, 0.5])[:, None, None], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected an observation with budget, got none"):
        replace(both, blending=None).score(0, o)


@pytest.mark.parametrize("budget", [15, 34])
def test_defensive_scores_by_the_authors_steps(budget: int) -> None:
    """One sequence, one row at a time, in their order; the first rows end by the budget, or by what they receive."""
    o = observe(40, 6, batch=1)
    weight = torch.randn(9, H * 2 * D, generator=torch.Generator().manual_seed(1))
    o = replace(o, output_projection=weight, budget=torch.tensor([budget]))
    norms = projected_norms(o)[0, :, :34]
    got = DefensiveScore(window=6).score(0, o)[0]
    weights = torch.stack([attention_weights(o, h)[0, :, :, :34] for h in range(H)])
    bias = weights[..., -6:].sum(-1).mean()
    flat = weights.flatten(0, 2)
    pooled = torch.nn.functional.avg_pool1d(flat[:, None], 5, 1, 2)[:, 0]
    pooled = (pooled / pooled.sum(-1, keepdim=True) * flat.sum(-1, keepdim=True)).view_as(weights)
    largest = pooled.amax((1, 2))
    scores = largest.clamp(min=largest.mean(-1, keepdim=True)) * norms / norms.sum(0)
    mean = weights.mean((1, 2))
    order = (mean / mean.sum(-1, keepdim=True)).sort(descending=True)
    for h in range(H):
        count = min(int((order.values[h].cumsum(0) < 0.9 - bias).sum()), budget - 6)
        first = set(order.indices[h, :count].tolist())
        assert set(got[h].isinf().nonzero().flatten().tolist()) == first
        rest = [n for n in range(34) if n not in first]
        torch.testing.assert_close(got[h, rest], scores[h, rest])
    assert (got[:, 34:] == 0).all()


def test_streaming_and_random_go_with_every_rule() -> None:
    grid = [rule(scorer) for rule in (AdaKV, PyramidKV, LAVa) for scorer in (Random(), StreamingLLM())]
    assert len({repr(policy) for policy in grid}) == 6 and all(policy.needs == frozenset() for policy in grid)
