"""Policies by name and by what they look at: those that score without queries, and the masks of an observation."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from observations import HIDDEN, B, D, H, observe, pad

import lkv_ext
from lkv import policies
from lkv.policies import AdaKV, KVzip, Random, SnapKV, StreamingLLM
from lkv.policies.base import Wrapper
from lkv.policies.lkv import LKV, Learned, LKVThreshold
from lkv.policies.lkv.head_budget import HeadBudget
from lkv.policies.lkv.token_scorer import TokenScorer


def test_valid_rows_of_an_observation() -> None:
    observed = replace(observe(6, 2), starts=torch.tensor([[0, 2, 5], [6, 0, 1]]))
    observed = replace(observed, lengths=torch.tensor([[6, 3, 1], [0, 0, 4]]))
    assert observed.ranks()[0].tolist() == [list(range(6)), list(range(-2, 4)), list(range(-5, 1))]
    places = [[[i for i, v in enumerate(row) if v] for row in heads] for heads in observed.valid().tolist()]
    assert places == [[[0, 1, 2, 3, 4, 5], [2, 3, 4], [5]], [[], [], [1, 2, 3, 4]]]


def test_streaming_llm_keeps_the_first_and_the_last() -> None:
    policy = StreamingLLM(sink=3)
    observed = pad(observe(12, 1), 2, 1)
    scores = policy.score(0, observed)
    budgets = policy.budgets(scores, observed.lengths, torch.tensor([7 * H] * B), starts=observed.starts)
    options = dict(lengths=observed.lengths, starts=observed.starts, sink=policy.sink, window=policy.window)
    kept = lkv_ext.select(scores, budgets, **options)
    assert kept.positions.view(B, H, 7).tolist() == [[[2, 3, 4, 10, 11, 12, 13]] * H] * B


class TestRandom:
    def test_draws_are_even_and_of_their_own(self) -> None:
        """By layer, head and seed; in [0, 1), of mean 1/2 and variance 1/12."""
        observed = observe(5000, 1, batch=1)
        draws = [Random(seed).score(layer, observed)[0] for seed in (0, 1) for layer in (0, 1)]
        flat = torch.cat(draws)
        assert flat.dtype == torch.float32 and flat.min() >= 0 and flat.max() < 1
        assert abs(flat.mean() - 0.5) < 0.01 and abs(flat.var() - 1 / 12) < 0.003
        correlations = torch.corrcoef(flat) - torch.eye(len(flat))
        assert correlations.abs().max() < 0.07  # five deviations of what chance would give
        assert torch.corrcoef(torch.stack([flat[0, :-1], flat[0, 1:]]))[0, 1].abs() < 0.07  # nor from row to row
        tenths = (flat * 10).long().flatten().bincount(minlength=10) / flat.numel()
        assert (tenths - 0.1).abs().max() < 0.01

    def test_a_place_is_drawn_once(self) -> None:
        """Whatever the keys are, and whatever has been evicted between."""
        whole, other = observe(40, 1), observe(40, 1, seed=9)
        rows = torch.tensor([0, 3, 9, 31, 39])
        scores = Random().score(3, whole)
        assert torch.equal(Random().score(3, other), scores)
        part = replace(whole, keys=whole.keys[:, :, rows], positions=whole.positions[..., rows])
        assert torch.equal(Random().score(3, part), scores[..., rows])


class TestLearned:
    """Two layers, whose scorers differ."""

    def policy(self, input: str, **ends: int) -> Learned:
        torch.manual_seed(0)
        scorer = TokenScorer(2, H, 2 * D if input == "kv" else HIDDEN, input, hidden=5)
        torch.nn.init.normal_(scorer.up_bias)
        return LKV(scorer, HeadBudget(2, H), **ends)

    @pytest.mark.parametrize("layer", [0, 1])
    @pytest.mark.parametrize("input", ["kv", "hidden"])
    def test_scores_are_those_of_the_mlp_of_a_head(self, input: str, layer: int) -> None:
        policy, o = self.policy(input), observe(20, 1)
        scores = policy.score(layer, o)
        assert not scores.requires_grad
        for h in range(H):
            rows = torch.cat([o.pre_rope_keys[:, h], o.values[:, h]], -1) if input == "kv" else o.hidden_states
            scorer = policy.scorer
            raw = F.silu(rows @ scorer.up[layer, h] + scorer.up_bias[layer, h]) @ scorer.down[layer, h]
            raw = (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, correction=0, keepdim=True)
            torch.testing.assert_close(scores[:, h], raw, rtol=1e-3, atol=1e-3)

    def test_tokens_whose_rows_are_gone_score_no_row(self) -> None:
        """Hidden states are of all tokens: a row takes the one of its place, and the scale is of the rows left."""
        policy, whole = self.policy("hidden"), observe(30, 1)
        rows = torch.tensor([[1, 4, 29], [0, 17, 18], [2, 3, 28]]).expand(B, H, 3)
        left = replace(
            whole,
            keys=whole.keys[:, :, :3],
            positions=torch.cat([rows, torch.full((B, H, 2), -1)], 2),
            lengths=torch.full((B, H), 3),
        )
        left = replace(left, keys=whole.keys[:, :, :5])
        raw = policy.scorer.raw(1, whole.hidden_states[:, None]).gather(2, rows)
        expected = (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, correction=0, keepdim=True)
        scores = policy.score(1, left)
        torch.testing.assert_close(scores[..., :3], expected, rtol=1e-3, atol=1e-3)
        assert (scores[..., 3:] == 0).all()

    def test_sums_of_a_threshold_are_float64(self) -> None:
        """Scores that lie far from 0 keep their deviation, whatever came before."""
        policy, o = LKVThreshold(self.policy("kv").scorer, HeadBudget(2, H, "threshold")), observe(400, 1)
        with torch.no_grad():
            policy.scorer.down.mul_(0.01)
            policy.scorer.up_bias.add_(3000.0)
        raw = policy.raw(0, o)
        assert raw.abs().amin() > 100 * raw.std(-1).amax()
        carried = policy.accumulate(0, o, None)
        sums = torch.stack([raw.double().sum(-1), (raw.double() ** 2).sum(-1)], -1)
        torch.testing.assert_close(carried.heads[..., 1:3], sums, rtol=1e-13, atol=0)

    def test_what_is_needed_is_the_scorers(self) -> None:
        assert self.policy("kv").needs == {"pre_rope_keys"} and self.policy("hidden").needs == {"hidden_states"}
        for scorer in (SnapKV(window=4), KVzip()):
            policy, o = LKV(scorer, HeadBudget(2, H)), observe(12, 4)
            assert policy.needs == scorer.needs
            assert torch.equal(policy.score(1, o), scorer.score(1, o))
        places = LKV(Random(), HeadBudget(2, H)).score(1, observe(12, 4))
        assert torch.equal(places, Random().score(1, observe(12, 4)))


def test_policies_by_name_and_object() -> None:
    for name, make in policies.POLICIES.items():
        assert policies.get(name) == make() and isinstance(policies.get(name), policies.Policy)
    policy = SnapKV(window=8)
    assert policies.get(policy) is policy
    with pytest.raises(ValueError, match="expected one of adakv, cake, .*, tova, got 'h3o'"):
        policies.get("h3o")
    with pytest.raises(TypeError, match=r"expected a name or a policy, got 3 without needs, scope"):
        policies.get(3)
    with pytest.raises(TypeError, match="expected a name or a policy"):
        policies.get(SnapKV)


class Whole(SnapKV):
    scope = "network"


class Curious(SnapKV):
    needs = frozenset({"queries", "logits"})


@pytest.mark.parametrize("policy", [Whole(), Curious()], ids=["scope", "needs"])
def test_scopes_and_needs_that_nobody_knows(policy: SnapKV) -> None:
    with pytest.raises(ValueError, match="expected a scope of layer, model, cascade and needs of all_queries, "):
        policies.get(policy)


def test_budgets_are_computed_or_known_ahead() -> None:
    """Known ahead they are of one layer: with another scope `budgets` is called."""
    static = LKV(Random(), HeadBudget(2, H))
    assert policies.get(static) is static and not hasattr(static, "budgets")

    class Together(LKV):
        scope = "model"

    with pytest.raises(TypeError, match="(?s)expected a name or a policy, got .* without budgets"):
        policies.get(Together(Random(), HeadBudget(2, H)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SnapKV(window=0), "window >= 1"),
        (lambda: SnapKV(kernel_size=0), "odd kernel_size"),
        (lambda: SnapKV(kernel_size=4), "odd kernel_size"),
        (lambda: SnapKV(pooling="mean"), "pooling 'avg' or 'max'"),
        (lambda: AdaKV(alpha=2), "alpha in"),
        (lambda: AdaKV(alpha=-0.1), "alpha in"),
        (lambda: AdaKV(floor="none"), "floor 'minimum' or 'blend'"),
        (lambda: StreamingLLM(sink=-1), "sink >= 0"),
    ],
)
def test_settings_out_of_range(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", policies.names())
def test_no_policy_protects_fewer_rows_than_none(name: str) -> None:
    policy = policies.get(name)
    for end in {field.name for field in fields(policy)} & {"sink", "window"}:
        with pytest.raises(ValueError, match=f"{end} >= "):
            replace(policy, **{end: -1})


@pytest.mark.parametrize("name", [x for x in policies.names() if isinstance(policies.get(x), Wrapper)])
def test_no_wrapper_takes_a_policy_of_all_layers(name: str) -> None:
    with pytest.raises(ValueError, match="expected a scorer of scope 'layer', got 'model'"):
        replace(policies.get(name), scorer=KVzip(across="layers"))


def test_settings_at_the_edge_of_their_range() -> None:
    assert SnapKV(window=1, kernel_size=1) and StreamingLLM(sink=0) and AdaKV(alpha=0.0) and AdaKV(alpha=1.0)
