"""Budgets of policies: against the reference under padding, by hand where a setting has to show, and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lkv import policies, reference
from lkv.policies import AdaKV, Ahead, KVzip, Policy, Random, SnapKV, StreamingLLM
from lkv.policies.lkv import LKV, Learned, LKVThreshold, learned
from lkv.policies.lkv.head_budget import HeadBudget
from lkv.policies.lkv.token_scorer import TokenScorer

LAYERS = 2


def trained(heads: int, kind: str, sink: int = 4, window: int = 8) -> Learned:
    torch.manual_seed(heads)
    budget = HeadBudget(LAYERS, heads, kind, floor=0.0)
    if budget.logits is not None:
        with torch.no_grad():
            budget.logits.mlp[2].weight.normal_(0, 3)
    return learned(TokenScorer(LAYERS, heads, 4), budget, sink, window)


@dataclass
class Batch:
    """Scores of layers `[B, H, L]`, lengths `[N, B, H]`, starts `[B, H]` and totals `[B]`."""

    scores: list[Tensor]
    lengths: Tensor
    starts: Tensor
    total: Tensor


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Ties are common, and totals from nothing to more than there is; heads are as unequal as after an eviction."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size, seed = draw(st.integers(1, 12)), draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randint(5, (batch, heads, size), generator=g) / 4 for _ in range(LAYERS)]
    starts = torch.randint(size, (batch, 1), generator=g).expand(batch, heads)
    lengths = torch.randint(size + 1, (LAYERS, batch, heads), generator=g).minimum(size - starts)
    total = torch.randint(LAYERS * heads * size + 3, (batch,), generator=g)
    return Batch(scores, lengths, starts, total)


def by_sorting(x: Batch, layers: list[int], b: int, **rule: object) -> list[int]:
    heads = x.starts.shape[1]
    rows = [x.scores[n][b, h] for n in layers for h in range(heads)]
    ranges = [(int(x.starts[b, h]), int(x.lengths[n, b, h])) for n in layers for h in range(heads)]
    return reference.budgets_from_scores(rows, int(x.total[b]), ranges=ranges, **rule)


@given(batches(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 10))
def test_adakv_is_a_competition_of_the_heads(x: Batch, sink: int, window: int, tenths: int) -> None:
    heads = x.starts.shape[1]
    for floor in ("minimum", "blend"):
        policy = AdaKV(Random(sink=sink, window=window), alpha=tenths / 10, floor=floor)
        got = policy.budgets(x.scores[0], x.lengths[0], x.total, starts=x.starts)
        for b, total in enumerate(x.total.tolist()):
            rule = dict(blend=Fraction(tenths, 10))
            if floor == "minimum":
                rule = dict(minimum=int(total / heads * (tenths / 10)))
            assert got[b].tolist() == by_sorting(x, [0], b, sink=sink, window=window, **rule)
            assert int(got[b].sum()) == min(total, int(x.lengths[0, b].sum()))


@given(batches(), st.integers(0, 3))
def test_kvzip_is_a_competition_of_all_heads(x: Batch, sink: int) -> None:
    joint = KVzip(sink).budgets(x.scores, x.lengths, x.total, starts=x.starts)
    heads = KVzip(sink, across="heads")
    single = heads.budgets(x.scores[1], x.lengths[1], x.total, starts=x.starts)
    assert torch.equal(heads.budgets(x.scores, x.lengths, x.total, starts=x.starts)[1], single)
    for b in range(len(x.total)):
        assert joint[:, b].flatten().tolist() == by_sorting(x, [0, 1], b, sink=sink)
        assert single[b].tolist() == by_sorting(x, [1], b, sink=sink)


@given(batches(), st.integers(0, 3), st.integers(0, 3))
def test_a_threshold_adds_a_bias_to_every_head(x: Batch, sink: int, window: int) -> None:
    policy = trained(x.starts.shape[1], "threshold", sink, window)
    bias = policy.budget.bias().detach()
    scores = [s * 4 * bias.abs().max() for s in x.scores]  # or the bias alone would decide
    biased = Batch([s + bias[n][:, None] for n, s in enumerate(scores)], x.lengths, x.starts, x.total)
    got = policy.budgets(scores, x.lengths, x.total, starts=x.starts)
    assert not got.requires_grad
    for b in range(len(x.total)):
        assert got[:, b].flatten().tolist() == by_sorting(biased, [0, 1], b, sink=sink, window=window)


@given(batches())
def test_equal_heads_share_alike(x: Batch) -> None:
    """What a head does not have goes to the others; a remainder to the lower heads."""
    for policy in (SnapKV(), StreamingLLM(), Random(), KVzip(across=None)):
        got = policy.budgets(x.scores[0], x.lengths[0], x.total, starts=x.starts)
        for b, total in enumerate(x.total.tolist()):
            left, even = min(total, int(x.lengths[0, b].sum())), [0] * x.starts.shape[1]
            while left:
                h = min((h for h in range(len(even)) if even[h] < x.lengths[0, b, h]), key=lambda h: (even[h], h))
                even[h], left = even[h] + 1, left - 1
            assert got[b].tolist() == even


def test_uniform_budgets_by_hand() -> None:
    lengths = torch.tensor([[10, 10, 10], [2, 9, 9]])
    budgets = SnapKV().budgets(torch.zeros(2, 3, 10), lengths, torch.tensor([16, 14]))
    assert budgets.tolist() == [[6, 5, 5], [2, 6, 6]] and budgets.dtype == torch.int64
    assert SnapKV().budgets(torch.zeros(2, 3, 10), lengths, torch.tensor([99, 0])).tolist() == [[10, 10, 10], [0] * 3]


# Two heads, ten rows each and a window of two: the worked case of Ada-KV, seven rows a head on average.
WEAK = [0.12, 0.11, 0.10, 0.08, 0.07, 0.06, 0.055, 0.045, 0.035, 0.025]
STRONG = [0.30, 0.22, 0.15, 0.09, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005]
LENGTHS = torch.tensor([[12, 12]])


@pytest.mark.parametrize("floor", ["minimum", "blend"])
def test_published_example(floor: str) -> None:
    scores = torch.tensor([[STRONG + [0.0, 0.0], WEAK + [0.0, 0.0]]])
    policy = AdaKV(SnapKV(window=2), alpha=0.2, floor=floor)
    assert policy.budgets(scores, LENGTHS, torch.tensor([14])).tolist() == [[6, 8]]


@pytest.mark.parametrize(
    ("alpha", "minimum", "blend"),
    [
        (0.0, [12, 2], [12, 2]),  # nothing beyond the window is sure
        (0.2, [12, 2], [11, 3]),  # 1.4 rows, which the window is; 0.8 * (10, 0) + 0.2 * 5 = (9, 1)
        (0.45, [11, 3], [10, 4]),  # 3.15 rows; (7.75, 2.25)
        (0.55, [11, 3], [9, 5]),  # 3.85 rows: no more than 3; (7.25, 2.75)
        (0.9, [8, 6], [8, 6]),  # 6.3 rows; (5.5, 4.5), whose remainders are equal
        (1.0, [7, 7], [7, 7]),
    ],
)
def test_what_alpha_makes_sure(alpha: float, minimum: list[int], blend: list[int]) -> None:
    """The first head would win everything."""
    scores = torch.tensor([[[9.0 - i / 10 for i in range(12)], [1.0 - i / 100 for i in range(12)]]])
    for floor, expected in (("minimum", minimum), ("blend", blend)):
        policy = AdaKV(SnapKV(window=2), alpha, floor)
        assert policy.budgets(scores, LENGTHS, torch.tensor([14])).tolist() == [expected]


def test_the_first_rows_are_the_sink_and_the_last_the_window() -> None:
    """With three first rows and one last protected the first head wins four rows; the other way round, two."""
    scores = torch.tensor([[[0.0, 0, 0, 9, 8, 7, 6, 0], [0.0, 0, 0, 1, 2, 3, 4, 0]]])
    lengths, total = torch.tensor([[8, 8]]), torch.tensor([12])
    for sink, window, expected in ((3, 1, [8, 4]), (1, 3, [6, 6])):
        ends = Random(sink=sink, window=window)
        for policy in (AdaKV(ends, 0.0, "minimum"), AdaKV(ends, 0.0, "blend")):
            assert policy.budgets(scores, lengths, total).tolist() == [expected]
        threshold = trained(2, "threshold", sink, window)
        torch.nn.init.zeros_(threshold.budget.logits.mlp[2].weight)
        both = threshold.budgets([scores, torch.zeros(1, 2, 8) - 1], lengths.expand(2, 1, 2), total + 8)
        assert both.tolist() == [[expected], [[4, 4]]]
    assert KVzip(3, "heads").budgets(scores, lengths, total).tolist() == [[7, 5]]


def test_totals_of_a_batch_have_minima_of_their_own() -> None:
    """3, 5 and 7 sure rows; left padding of one sequence, and short heads of another."""
    first, second = [9.0 - i / 10 for i in range(20)], [1.0 - i / 100 for i in range(20)]
    scores = torch.tensor([[first, second]] * 3)
    lengths, starts = torch.tensor([[20, 20], [12, 12], [20, 5]]), torch.tensor([[0, 0], [8, 8], [0, 0]])
    policy = AdaKV(Random(sink=1, window=2), alpha=0.5, floor="minimum")
    budgets = policy.budgets(scores, lengths, torch.tensor([15, 20, 29]), starts=starts)
    assert budgets.tolist() == [[12, 3], [12, 8], [20, 5]]
    assert policy.budgets(scores, lengths, torch.tensor([15, 17, 24]), starts=starts).tolist() == [
        [12, 3], [12, 5], [19, 5],
    ]  # fmt: skip


class TestLKV:
    def test_a_table_is_of_protected_rows_and_shares(self) -> None:
        policy = trained(3, "capped")
        for rows, length in ((20, 100), (12, 40), (5, 100), (60, 60)):
            table = policy.table(rows, length)
            assert torch.equal(table, policy.budget.table(rows * 6, length, 12))
            assert int(table.sum()) == rows * 6 and int(table.min()) >= min(rows, 12)
        assert policy.table(5, 100).tolist() == [[5] * 3] * 2
        assert policy.table(20, 100).unique().numel() > 3
        assert policy.table(3, 3).tolist() == [[3] * 3] * 2

    def test_a_layer_has_its_part_of_the_table(self) -> None:
        policy, rows, lengths = trained(3, "capped"), torch.tensor([20, 30, 8]), torch.tensor([100, 64, 9])
        for layer in range(LAYERS):
            budgets = policy.ahead(layer, rows, lengths)
            assert budgets.shape == (3, 3) and budgets.dtype == torch.int64
            for b in range(3):
                assert torch.equal(budgets[b], policy.table(int(rows[b]), int(lengths[b]))[layer])
        assert not torch.equal(policy.ahead(0, rows, lengths), policy.ahead(1, rows, lengths))

    def test_a_kind_of_budget_asks_for_its_policy(self) -> None:
        for kind in ("capped", "softmax", "uniform"):
            policy = trained(2, kind)
            assert type(policy) is LKV and policy.scope == "layer" and isinstance(policy, Ahead)
        policy = trained(2, "threshold")
        assert type(policy) is LKVThreshold and policy.scope == "model" and not isinstance(policy, Ahead)
        default = learned(policy.scorer, policy.budget)
        assert (default.sink, default.window) == (4, 8) == (Learned(None, None).sink, Learned(None, None).window)
        other = learned(policy.scorer, trained(2, "uniform").budget, 3, 5)
        assert (other.sink, other.window) == (3, 5)


# name: needs, scope, sink, window with the policy's defaults
DEFAULTS = {
    "adakv": ({"queries"}, "layer", 0, 32),
    "cake": ({"queries"}, "cascade", 0, 32),
    "caote": ({"queries"}, "layer", 0, 32),
    "compactor": ({"all_queries", "budget", "pre_rope_keys"}, "layer", 8, 4),
    "criticalkv": ({"output_projection", "queries"}, "layer", 0, 32),
    "defensivekv": ({"budget", "output_projection", "queries"}, "layer", 0, 32),
    "expected_attention": ({"all_queries", "rotary"}, "layer", 4, 0),
    "fast_caote": ({"queries"}, "layer", 0, 32),
    "h2o": ({"all_queries"}, "layer", 0, 0),
    "keydiff": (set(), "layer", 0, 0),
    "knorm": (set(), "layer", 0, 0),
    "kvzip": ({"queries", "second_pass"}, "model", 4, 0),
    "lagkv": (set(), "layer", 4, 0),
    "lava": ({"queries"}, "cascade", 0, 32),
    "lava_code": ({"queries"}, "cascade", 0, 32),
    "layer_defensivekv": ({"budget", "output_projection", "queries"}, "cascade", 0, 32),
    "pyramidkv": ({"queries"}, "layer", 0, 8),
    "random": (set(), "layer", 4, 32),
    "rkv": ({"queries"}, "layer", 0, 8),
    "sagekv": ({"queries"}, "layer", 0, 1),
    "snapkv": ({"queries"}, "layer", 0, 32),
    "squeeze": ({"attention_cosine"}, "model", 4, 0),
    "streaming_llm": (set(), "layer", 4, 0),
    "tova": ({"queries"}, "layer", 0, 1),
}


def test_defaults() -> None:
    assert DEFAULTS.keys() == policies.POLICIES.keys()
    for name, (needs, scope, sink, window) in DEFAULTS.items():
        policy = policies.get(name)
        assert (policy.needs, policy.scope, policy.sink, policy.window) == (needs, scope, sink, window), name
    assert policies.get("adakv") == AdaKV(SnapKV(32, 7, "max", 0, "mean", True), 0.2, "blend")
    assert policies.get("kvzip") == KVzip(4, "layers") and policies.get("random") == Random(0, 4, 32)
    assert policies.get("snapkv") == SnapKV(32, 5, "avg", 0, "mean", False)


@pytest.mark.parametrize("scorer", [Random(sink=3, window=5), KVzip(2, None), trained(2, "capped", 1, 7)], ids=type)
def test_adakv_protects_what_its_scorer_does(scorer: Policy) -> None:
    policy = AdaKV(scorer)
    assert (policy.needs, policy.sink, policy.window) == (scorer.needs, scorer.sink, scorer.window)
    assert policy.scope == "layer" and not isinstance(policy, Ahead)


def test_scopes_of_competitions() -> None:
    assert [KVzip(across=x).scope for x in ("layers", "heads", None)] == ["model", "layer", "layer"]
    for scorer in (KVzip(), trained(2, "threshold")):
        with pytest.raises(ValueError, match="lkv.AdaKV: expected a scorer of scope 'layer', got 'model'"):
            AdaKV(scorer)
    with pytest.raises(ValueError, match="lkv.KVzip: expected across 'layers', 'heads' or None, got 'model'"):
        KVzip(across="model")
