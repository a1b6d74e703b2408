"""Scores worked out by hand for every method, and the published cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from observations import D, Given, H, Still, observe, rows_of

import lkv_ext
from lkv.policies import (
    CAKE,
    CAOTE,
    H2O,
    SAGEKV,
    TOVA,
    CAKEScore,
    Compactor,
    CriticalKV,
    DefensiveScore,
    ExpectedAttention,
    FastCAOTE,
    KeyDiff,
    KNorm,
    LagKV,
    LAVa,
    LAVaScore,
    Leverage,
    Observation,
    QueryStatistics,
    SnapKV,
)
from lkv.policies.attention import attention_weights, blocks
from lkv.policies.criticalkv import projected_norms
from lkv.policies.lava import lava_code


def attending(logits: Sequence[Sequence[float]]) -> Observation:
    """One KV head: queries `[G]` at its end whose logits are those given, `[G][L]`."""
    group, length = len(logits), len(logits[0])
    queries = torch.eye(group)[None, :, None]
    keys = torch.tensor(logits).T[None]
    return rows_of(
        keys, queries=queries, query_positions=torch.tensor([[length - 1]]), query_mask=torch.ones(1, 1).bool()
    )


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


def test_keys_of_a_small_norm_and_keys_unlike_the_others() -> None:
    keys = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]])
    assert KNorm().score(0, rows_of(keys)).tolist() == [[[-5.0, -1.0, -2.0]]]
    assert KNorm().score(0, rows_of(keys.bfloat16())).dtype == torch.float32
    directions = torch.nn.functional.normalize(keys[0], dim=-1)
    mean = directions.mean(0) / directions.mean(0).norm()
    torch.testing.assert_close(KeyDiff().score(0, rows_of(keys))[0, 0], -directions @ mean)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_blocks_of_queries_are_all_queries(size: int) -> None:
    o = observe(9, 4)
    parts = list(blocks(o, size))
    for name, axis in (("queries", 2), ("query_positions", 1), ("query_mask", 1)):
        assert torch.equal(torch.cat([part.part(name) for part in parts], axis), o.part(name))
    assert max(part.part("queries").shape[2] for part in parts) == min(size, 4)


def test_tova_averages_over_all_heads_of_a_layer() -> None:
    o = observe(9, 3, batch=1)
    score = TOVA().score(0, o)
    one = SnapKV(window=1, kernel_size=1)
    last = o.last_queries(1)
    mean = torch.stack([one.score(0, last)[0, h] for h in range(H)]).mean(0)
    for h in range(H):
        torch.testing.assert_close(score[0, h, :8], mean[:8])
    # As if heads held different rows: they are known by their positions.
    rows = torch.tensor([[0, 2, 5, 8], [0, 3, 5, 7], [1, 2, 5, 8]])
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


def received_in_pieces(o: Observation) -> torch.Tensor:
    """Of rows 3 to 37 in pieces of 16, float64 `[2, H, 35]`: row by row what Compactor adds to the leverage."""
    out, group = torch.zeros(2, H, 40, dtype=torch.float64), o.queries.shape[1] // H
    for b in range(2):
        for h in range(H):
            for piece in (slice(3, 19), slice(19, 35), slice(35, 38)):
                for q in range(h * group, (h + 1) * group):
                    logits = o.queries[b, q, piece].double() @ o.keys[b, h, piece].double().T
                    out[b, h, piece] += logits.softmax(-1).sum(0) / group
            out[b, h] *= o.values[b, h].double().norm(dim=-1)
    out = torch.nn.functional.avg_pool1d(out, 3, 1, 1)[:, :, 3:38]
    return (out - out.mean((1, 2), keepdim=True)) / out.std((1, 2), keepdim=True)


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
    torch.testing.assert_close(received[:, :, 3:38].double(), received_in_pieces(o), rtol=1e-3, atol=1e-3)
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
        certain = DefensiveScore(window=6, sure=False).score(0, o)[0]
        torch.testing.assert_close(certain[h, sorted(first)], scores.max().expand(len(first)))
        torch.testing.assert_close(certain[h, rest], scores[h, rest])
    assert (got[:, 34:] == 0).all()
