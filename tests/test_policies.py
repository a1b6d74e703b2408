"""Policies against loops over batch, head, query and row; and padding, on either side, changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lkv_ext
from lkv import policies
from lkv.policies import AdaKV, Observation, SnapKV, StreamingLLM

B, H, G, D = 2, 3, 2, 8
SCORERS = [
    SnapKV(window=4, kernel_size=1),
    SnapKV(window=4, kernel_size=5),
    SnapKV(window=7, kernel_size=3, pooling="max"),
    StreamingLLM(sink=2),
    AdaKV(SnapKV(window=5)),
]


def observe(length: int, window: int, seed: int = 0, batch: int = B, softcap: float | None = None) -> Observation:
    """A dense prefill without padding."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, H, length, D, generator=g) for _ in range(2))
    window = min(window, length)
    return Observation(
        keys=keys,
        values=values,
        positions=torch.arange(length).expand(batch, H, length),
        lengths=torch.full((batch, H), length),
        starts=torch.zeros(batch, H, dtype=torch.long),
        queries=torch.randn(batch, H * G, window, D, generator=g),
        query_positions=torch.arange(length - window, length).expand(batch, -1),
        query_mask=torch.ones(batch, window, dtype=torch.bool),
        scaling=0.7,
        softcap=softcap,
    )


def pad(observed: Observation, left: int, right: int = 0, fill: float = 3.0) -> Observation:
    """The same rows `left` places later, as in a padded batch; the padding holds `fill`."""

    def widen(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0, left, right), value=fill)

    length = observed.keys.shape[2] + left + right
    return replace(
        observed,
        keys=widen(observed.keys),
        values=widen(observed.values),
        positions=torch.arange(length).expand(B, H, length),
        starts=observed.starts + left,
        query_positions=observed.query_positions + left,
    )


def snapkv_by_loops(policy: SnapKV, o: Observation) -> Tensor:
    """Scores of the valid rows of observations without padding, one number at a time, in float64."""
    batch, heads, length = o.keys.shape[:3]
    group = o.queries.shape[1] // heads
    evictable = max(length - policy.window, 0)
    scores = torch.zeros(batch, heads, length, dtype=torch.float64)
    half = policy.kernel_size // 2
    for b in range(batch):
        for h in range(heads):
            pooled = []
            for g in range(group):
                mean = [0.0] * length
                for j, q in enumerate(o.queries[b, h * group + g].double()):
                    seen = [i for i in range(length) if o.positions[b, h, i] <= o.query_positions[b, j]]
                    logits = [float(q @ o.keys[b, h, i].double()) * o.scaling for i in seen]
                    if o.softcap is not None:
                        logits = [o.softcap * math.tanh(x / o.softcap) for x in logits]
                    if o.sinks is not None:
                        logits.append(float(o.sinks[h * group + g]))
                    exps = [math.exp(x - max(logits)) for x in logits]
                    for i, e in zip(seen, exps, strict=o.sinks is None):
                        mean[i] += e / sum(exps) / len(o.queries[b, 0])
                cut = [0.0] * half + mean[:evictable] + [0.0] * half
                reduce = max if policy.pooling == "max" else lambda part: sum(part) / len(part)
                pooled.append([reduce(cut[i : i + policy.kernel_size]) for i in range(evictable)])
            for i in range(evictable):
                scores[b, h, i] = sum(p[i] for p in pooled) / group
    return scores


@pytest.mark.parametrize("softcap, sinks", [(None, None), (2.0, None), (None, [0.3, -1.0, 2.0, 0.0, -math.inf, 5.0])])
@pytest.mark.parametrize("length", [1, 3, 6, 23])
@pytest.mark.parametrize("policy", [p for p in SCORERS if isinstance(p, SnapKV)], ids=str)
def test_snapkv_scores_as_the_loops_do(policy, length, softcap, sinks):
    observed = observe(length, policy.window, seed=length, softcap=softcap)
    observed = replace(observed, sinks=None if sinks is None else torch.tensor(sinks))
    scores = policy.score(0, observed).double()
    torch.testing.assert_close(scores, snapkv_by_loops(policy, observed), rtol=1e-5, atol=1e-7)


def test_snapkv_knows_rows_by_their_positions():
    """A later turn: rows were evicted between those that are left, heads differ, and a query sees what came before."""
    dense = observe(30, 4, seed=5)
    kept = [[0, 3, 9, 10, 11, 26, 27, 28, 29], [1, 2, 28, 29], [5, 25, 26, 27, 28, 29]]
    width = max(map(len, kept))
    index = torch.tensor([rows + [0] * (width - len(rows)) for rows in kept]).expand(B, H, width)
    take = index[..., None].expand(-1, -1, -1, D)
    ragged = replace(
        dense,
        keys=dense.keys.gather(2, take),
        values=dense.values.gather(2, take),
        positions=index,
        lengths=torch.tensor([list(map(len, kept))] * B),
    )
    policy = SnapKV(window=4, kernel_size=3)
    scores = policy.score(0, ragged)
    for h, rows in enumerate(kept):
        alone = replace(
            dense,
            keys=dense.keys[:, h : h + 1, rows],
            positions=dense.positions[:, h : h + 1, rows],
            queries=dense.queries[:, h * G : (h + 1) * G],
        )
        expected = snapkv_by_loops(policy, alone)
        torch.testing.assert_close(scores[:, h, : len(rows)].double(), expected[:, 0], rtol=1e-5, atol=1e-7)
        assert (scores[:, h, len(rows) :] == 0).all()


@pytest.mark.parametrize("left, right", [(0, 4), (5, 0), (3, 2)])
@pytest.mark.parametrize("policy", SCORERS, ids=str)
def test_padding_changes_nothing(policy, left, right):
    window = max(policy.window, 1)
    observed = observe(17, window, seed=1)
    scores = policy.score(0, observed)
    for fill in (3.0, torch.nan):
        padded = policy.score(0, pad(observed, left, right, fill))
        assert not padded.isnan().any()
        torch.testing.assert_close(padded[..., left : left + 17], scores, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("policy", SCORERS, ids=str)
def test_a_prompt_shorter_than_the_window_in_a_padded_batch(policy):
    """Queries that are padding see nothing and count for nothing."""
    alone = observe(3, max(policy.window, 1), batch=1)
    long = observe(11, max(policy.window, 1), seed=9, batch=1)
    width = long.queries.shape[2]
    padded = pad(replace(alone, positions=alone.positions.expand(B, H, 3)), 8)
    lost = torch.zeros(1, H * G, width - alone.queries.shape[2], D)
    both = Observation(
        keys=torch.cat([padded.keys, long.keys]),
        values=torch.cat([padded.values, long.values]),
        positions=long.positions.expand(2, H, 11),
        lengths=torch.cat([alone.lengths, long.lengths]),
        starts=torch.cat([padded.starts, long.starts]),
        queries=torch.cat([torch.cat([lost, alone.queries], 2), long.queries]),
        query_positions=long.query_positions.expand(2, -1),
        query_mask=torch.tensor([[False] * lost.shape[2] + [True] * alone.queries.shape[2], [True] * width]),
        scaling=alone.scaling,
    )
    scores = policy.score(0, both)
    torch.testing.assert_close(scores[:1, :, 8:], policy.score(0, alone), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores[1:], policy.score(0, long), rtol=1e-6, atol=1e-8)


def test_streaming_llm_keeps_the_first_and_the_last():
    policy = StreamingLLM(sink=3)
    observed = pad(observe(12, 1), 2, 1)
    scores = policy.score(0, observed)
    budgets = policy.budgets(scores, observed.lengths, torch.tensor([7 * H] * B), starts=observed.starts)
    options = dict(lengths=observed.lengths, starts=observed.starts, sink=policy.sink, window=policy.window)
    kept = lkv_ext.select(scores, budgets, **options)
    assert kept.positions.view(B, H, 7).tolist() == [[[2, 3, 4, 10, 11, 12, 13]] * H] * B


@pytest.mark.parametrize("policy", [SnapKV(), StreamingLLM()], ids=str)
def test_uniform_budgets_spend_the_total(policy):
    lengths = torch.tensor([[10, 10, 10], [2, 9, 9]])
    budgets = policy.budgets(torch.zeros(B, H, 10), lengths, torch.tensor([16, 14]))
    assert budgets.tolist() == [[6, 5, 5], [2, 6, 6]]
    assert policy.budgets(torch.zeros(B, H, 10), lengths, torch.tensor([99, 99])).tolist() == lengths.tolist()


def competition_by_sorting(scores: Tensor, total: int, window: int, sure: int) -> list[int]:
    """Ada-KV with a guaranteed minimum, for one sequence `[H, L]`: everything in one sorted list."""
    heads, length = scores.shape
    ranked = scores.clone()
    ranked[:, length - window :] = torch.inf
    kept = [set(ranked[h].argsort(descending=True, stable=True)[:sure].tolist()) for h in range(heads)]
    kept = [k | set(range(length - window, length)) for k in kept]
    rest = sorted((-float(scores[h, i]), h, i) for h in range(heads) for i in range(length) if i not in kept[h])
    for _, h, i in rest[: total - sum(map(len, kept))]:
        kept[h].add(i)
    return [len(k) for k in kept]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("left", [0, 6])
def test_adakv_minimum(alpha, left):
    policy = AdaKV(SnapKV(window=4), alpha=alpha)
    observed = observe(40, 4, seed=3)
    plain = policy.score(0, observed)
    padded = pad(observed, left)
    total = torch.tensor([12 * H, 20 * H])
    budgets = policy.budgets(policy.score(0, padded), padded.lengths, total, starts=padded.starts)
    for b in range(B):
        sure = int(alpha * int(total[b]) / H)
        assert budgets[b].tolist() == competition_by_sorting(plain[b], int(total[b]), 4, sure)
    assert torch.equal(budgets.sum(1), total)


def test_adakv_blend_draws_towards_the_mean():
    scores = AdaKV(SnapKV(window=4)).score(0, observe(40, 4, seed=3))
    lengths, total = torch.full((B, H), 40), torch.tensor([15 * H, 15 * H])
    free, half, even = (
        AdaKV(SnapKV(window=4), alpha, "blend").budgets(scores, lengths, total).double() for alpha in (0.0, 0.5, 1.0)
    )
    assert (even == 15).all() and torch.equal(free.sum(1), total.double())
    assert ((half - (free + even) / 2).abs() <= 1).all()
    assert not torch.equal(free, even)


def test_policies_by_name_and_object():
    assert policies.get("snapkv") == SnapKV() and policies.get("adakv") == AdaKV()
    assert policies.get("streaming_llm") == StreamingLLM()
    policy = SnapKV(window=8)
    assert policies.get(policy) is policy
    with pytest.raises(ValueError, match="expected one of adakv, kvzip, random, snapkv, streaming_llm, got 'h2o'"):
        policies.get("h2o")
    with pytest.raises(TypeError, match=r"expected a name or a policy, got 3 without needs, scope"):
        policies.get(3)
    with pytest.raises(TypeError, match="expected a name or a policy"):
        policies.get(SnapKV)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: SnapKV(window=0), "window >= 1"),
        (lambda: SnapKV(kernel_size=4), "odd kernel_size"),
        (lambda: SnapKV(pooling="mean"), "pooling 'avg' or 'max'"),
        (lambda: AdaKV(alpha=2), "alpha in"),
        (lambda: AdaKV(floor="none"), "floor 'minimum' or 'blend'"),
        (lambda: StreamingLLM(sink=-1), "sink >= 0"),
    ],
)
def test_settings_out_of_range(make, says):
    with pytest.raises(ValueError, match=says):
        make()
