"""Scores made of attention, with every setting that a model's logits may have: SnapKV and KVzip against loops over
batch, head, query and row, and what holds of all policies that look at queries.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from observations import HIDDEN, SETTINGS, D, G, H, Still, attention_by_loops, observe
from torch import Tensor

from lkv import policies
from lkv.policies import SAGEKV, KVzip, Observation, Policy, SnapKV, Weighs
from lkv.policies.base import refiner

SNAPKV = [
    SnapKV(window=4, kernel_size=1),
    SnapKV(window=4, kernel_size=5),
    SnapKV(window=7, kernel_size=3, pooling="max"),
    SnapKV(window=4, kernel_size=3, pooling="max", group_first=True),
    SnapKV(window=4, kernel_size=3, pooling="avg", group="max"),
    SnapKV(window=4, kernel_size=3, pooling="avg", group="max", group_first=True),
]
settings = pytest.mark.parametrize("setting", SETTINGS)
lengths = pytest.mark.parametrize("length", [1, 3, 6, 23])


def by_rows(policy: SnapKV, half: int, mean: list[float]) -> list[float]:
    cut = [0.0] * half + mean + [0.0] * half
    reduce = max if policy.pooling == "max" else lambda part: sum(part) / len(part)
    return [reduce(cut[i : i + policy.kernel_size]) for i in range(len(mean))]


def by_group(policy: SnapKV, rows: list[list[float]]) -> list[list[float]]:
    reduce = max if policy.group == "max" else lambda part: sum(part) / len(part)
    return [[reduce(part) for part in zip(*rows, strict=True)]]


def snapkv_by_loops(policy: SnapKV, o: Observation) -> Tensor:
    """Scores of the valid rows of observations without padding, in float64."""
    batch, heads, length = o.keys.shape[:3]
    group = o.queries.shape[1] // heads
    evictable = max(length - policy.window, 0)
    scores = torch.zeros(batch, heads, length, dtype=torch.float64)
    half = policy.kernel_size // 2
    for b in range(batch):
        for h in range(heads):
            rows = []
            for head in range(h * group, (h + 1) * group):
                weights = attention_by_loops(o, b, head)
                rows.append([sum(row[i] for row in weights) / len(weights) for i in range(evictable)])
            steps = [lambda rows: by_group(policy, rows), lambda rows: [by_rows(policy, half, row) for row in rows]]
            for step in steps if policy.group_first else steps[::-1]:
                rows = step(rows)
            scores[b, h, :evictable] = torch.tensor(rows[0], dtype=torch.float64)
    return scores


def kvzip_by_loops(o: Observation) -> Tensor:
    """The same for KVzip: the largest weight of all queries of the group."""
    batch, heads, length = o.keys.shape[:3]
    group = o.queries.shape[1] // heads
    scores = torch.zeros(batch, heads, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            rows = [row for head in range(h * group, (h + 1) * group) for row in attention_by_loops(o, b, head)]
            for i in range(length):
                scores[b, h, i] = max(row[i] for row in rows)
    return scores


def close(scores: Tensor, expected: Tensor) -> None:
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-7)


@settings
@lengths
@pytest.mark.parametrize("policy", SNAPKV, ids=str)
def test_snapkv_scores_as_the_loops_do(policy: SnapKV, length: int, setting: str) -> None:
    observed = observe(length, policy.window, seed=length, **SETTINGS[setting])
    close(policy.score(0, observed), snapkv_by_loops(policy, observed))


@settings
@lengths
def test_kvzip_scores_as_the_loops_do(length: int, setting: str) -> None:
    """Queries are those of a whole second pass, which come behind all rows of the text or among their own."""
    observed = observe(length, length, seed=length, **SETTINGS[setting])
    close(KVzip().score(0, observed), kvzip_by_loops(observed))
    behind = replace(observed, query_positions=observed.query_positions + length)
    scores = KVzip().score(0, behind)
    close(scores, kvzip_by_loops(behind))
    assert length == 1 or not torch.equal(scores, KVzip().score(0, observed))


@pytest.mark.parametrize("policy", [SNAPKV[1], KVzip()], ids=["snapkv", "kvzip"])
@pytest.mark.parametrize("heads, group", [(1, 1), (1, 4), (3, 1), (2, 3)])
def test_heads_and_groups(policy: SnapKV | KVzip, heads: int, group: int) -> None:
    sinks = torch.linspace(-2, 3, heads * group)
    observed = observe(19, 5, heads=heads, group=group, sinks=sinks)
    expected = kvzip_by_loops(observed) if isinstance(policy, KVzip) else snapkv_by_loops(policy, observed)
    close(policy.score(0, observed), expected)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("policy", [SnapKV(window=4, kernel_size=3), KVzip()], ids=["snapkv", "kvzip"])
def test_queries_that_are_not_there_do_not_count(policy: SnapKV | KVzip, sinks: bool) -> None:
    """Not even in the mean: as after a crop, or where a mask has hidden tokens. Without any, all scores are 0."""
    o = observe(20, 6, **(SETTINGS["sinks"] if sinks else {}))
    there = torch.tensor([False, True, True, False, True, True])
    few = replace(o, queries=o.queries[:, :, there], query_positions=o.query_positions[:, there])
    few = replace(few, query_mask=o.query_mask[:, there])
    some, none = (replace(o, query_mask=mask.expand(2, 6)) for mask in (there, torch.zeros_like(there)))
    torch.testing.assert_close(policy.score(0, some), policy.score(0, few))
    assert (policy.score(0, none) == 0).all()


def test_the_observation_window_is_the_policys_own() -> None:
    """More queries than the window protects rows for, or fewer, as after a crop: they score the same rows."""
    policy = SnapKV(window=6, kernel_size=3)
    for count in (2, 6, 9):
        observed = observe(20, count)
        scores = policy.score(0, observed)
        close(scores, snapkv_by_loops(policy, observed))
        assert (scores[..., :14] > 0).all() and (scores[..., 14:] == 0).all()


def test_a_tie_of_all_rows_and_weights_that_underflow() -> None:
    """Zero queries look at everything alike; enormous ones at a single row."""
    observed = observe(12, 4)
    flat = replace(observed, queries=torch.zeros_like(observed.queries))
    assert torch.allclose(KVzip().score(0, flat)[..., :9], torch.tensor(1 / 9))
    sharp = replace(observed, queries=observed.queries * 1e18)
    for policy in (KVzip(), SNAPKV[0]):
        scores = policy.score(0, sharp)
        assert scores.isfinite().all() and (scores >= 0).all() and (scores <= 1).all()
    assert (KVzip().score(0, sharp).flatten(2).topk(1).values == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_softened_in_float32(dtype: torch.dtype) -> None:
    observed = observe(40, 8, sinks=torch.full((H * G,), 1.0, dtype=dtype))
    observed = replace(observed, keys=observed.keys.to(dtype), queries=observed.queries.to(dtype))
    for policy in (KVzip(), SNAPKV[1]):
        expected = kvzip_by_loops(observed) if isinstance(policy, KVzip) else snapkv_by_loops(policy, observed)
        scores = policy.score(0, observed)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), expected, rtol=5e-2, atol=2e-3)
        assert scores[scores > 0].unique().numel() > 0.9 * (scores > 0).sum()  # not rounded to 8 bits


@pytest.mark.parametrize("policy", [SnapKV(window=4, kernel_size=3), KVzip()], ids=["snapkv", "kvzip"])
def test_rows_are_known_by_their_positions(policy: SnapKV | KVzip) -> None:
    """A later turn: rows were evicted between those that are left, heads differ, and a query sees what came before."""
    dense = observe(30, 4, seed=5)
    kept = [[0, 3, 9, 10, 11, 26, 27, 28, 29], [1, 2, 28, 29], [5, 25, 26, 27, 28, 29]]
    width = max(map(len, kept))
    index = torch.tensor([rows + [0] * (width - len(rows)) for rows in kept]).expand(2, H, width)
    take = index[..., None].expand(-1, -1, -1, D)
    ragged = replace(
        dense,
        keys=dense.keys.gather(2, take),
        values=dense.values.gather(2, take),
        positions=index,
        lengths=torch.tensor([list(map(len, kept))] * 2),
    )
    scores = policy.score(0, ragged)
    for h, rows in enumerate(kept):
        alone = replace(
            dense,
            keys=dense.keys[:, h : h + 1, rows],
            positions=dense.positions[:, h : h + 1, rows],
            queries=dense.queries[:, h * G : (h + 1) * G],
        )
        expected = kvzip_by_loops(alone) if isinstance(policy, KVzip) else snapkv_by_loops(policy, alone)
        close(scores[:, h, : len(rows)], expected[:, 0])
        assert (scores[:, h, len(rows) :] == 0).all()


# Compactor takes logits as they are, as kvpress does; the softmax of R-KV is over rows alone; and what a soft cap or
# sinks make of the expectation of ExpectedAttention has no closed form.
ASKING = {
    name: policy
    for name, policy in {x: policies.get(x) for x in policies.POLICIES}.items()
    if policy.needs & {"queries", "all_queries"} and name != "compactor"
} | {f"sagekv {group}": SAGEKV(group=group) for group in ("max", "sum")}
FREE = {"softcap": {"expected_attention"}, "sinks": {"expected_attention", "rkv"}}


def shown(policy: Policy, o: Observation) -> list[Tensor]:
    """All that a policy makes of an observation: scores, its choice where budgets are known, the weight of a layer."""
    found = [policy.score(0, o)]
    if isinstance(policy, Weighs):
        found.append(policy.importance(0, o, found[0]))
    if (chooses := refiner(policy)) is not None:
        found.append(chooses.refine(0, o, found[0].clone(), torch.full(o.lengths.shape, 20)))
    return found


@pytest.mark.parametrize("name", ASKING)
def test_settings_are_those_of_the_model(name: str) -> None:
    """Louder queries of a lower scale ask for the same; under a cap of nearly nothing, for all rows alike; beside sinks
    that take everything, for none.
    """
    policy, g = ASKING[name], torch.Generator().manual_seed(1)
    o = observe(60, 60, seed=2, output_projection=torch.randn(HIDDEN, H * G * D, generator=g))
    still = Still(torch.tensor([1.0, 0.5, 0.1, 0.01]), 60)
    o = replace(o, rotary=still, budget=torch.tensor([20, 20]), attention_cosine=torch.tensor([0.9, 0.7]))
    alike, none = replace(o, queries=torch.zeros_like(o.queries)), replace(o, query_mask=torch.zeros(2, 60).bool())
    pairs = {
        "scaling": (o, replace(o, queries=o.queries * 4, scaling=o.scaling / 4)),
        "softcap": (alike, replace(o, softcap=1e-12)),
        "sinks": (none, replace(o, sinks=torch.full((H * G,), 1e4))),
    }
    plain = shown(policy, o)
    for setting, (one, other) in pairs.items():
        if name not in FREE.get(setting, ()):
            assert all(map(torch.equal, shown(policy, one), shown(policy, other))), setting
            assert setting == "scaling" or not all(map(torch.equal, shown(policy, other), plain)), setting
