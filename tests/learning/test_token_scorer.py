"""LKV-T: the batched MLPs are those of the heads, one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lkv.policies.lkv import token_scorer
from lkv.policies.lkv.token_scorer import TokenScorer, moments, standardise


def make(input: str = "kv") -> TokenScorer:
    torch.manual_seed(2)
    return TokenScorer(2, 3, 10, input, hidden=7)


def test_heads_have_mlps_of_their_own_on_standardised_input() -> None:
    scorer, features = make(), 5 + 3 * torch.randn(2, 3, 40, 10)
    valid = torch.ones(2, 3, 40, dtype=torch.bool)
    scorer.fit_input(moments(features, valid).expand(2, -1, -1))
    scores = scorer.raw(1, features)
    for head in range(3):
        x = features[:, head]
        x = (x - x.flatten(0, 1).mean(0)) / x.flatten(0, 1).std(0, correction=0)
        hidden = F.silu(x @ scorer.up[1, head] + scorer.up_bias[1, head])
        torch.testing.assert_close(scores[:, head], hidden @ scorer.down[1, head], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [4, 64])
@pytest.mark.parametrize("hidden", [8, 128])
def test_scores_begin_at_one_scale_whatever_the_widths(features: int, hidden: int) -> None:
    """sqrt(E silu(x)^2) = 0.6 for a normal x."""
    torch.manual_seed(0)
    scorer = TokenScorer(1, 64, features, hidden=hidden)
    with torch.no_grad():
        raw = scorer.raw(0, torch.randn(1, 64, 100, features))
    assert 0.45 < raw.std() < 0.75


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, features = make(), torch.randn(2, 3, 50, 10)
    whole = scorer.raw(0, features)
    monkeypatch.setattr(token_scorer, "CHUNK", 16)
    with torch.no_grad():
        torch.testing.assert_close(scorer.raw(0, features), whole)


def test_hidden_states_are_shared_by_the_heads() -> None:
    scorer, features = make("hidden"), torch.randn(2, 1, 20, 10)
    torch.testing.assert_close(scorer.raw(0, features), scorer.raw(0, features.expand(-1, 3, -1, -1)))


def test_scores_are_of_one_scale_over_the_valid_tokens() -> None:
    valid = torch.arange(30) < torch.tensor([30, 17])[:, None, None]
    scores = make()(0, 9 * torch.randn(2, 3, 30, 10), valid.expand(2, 3, 30))
    for b, count in ((0, 30), (1, 17)):
        torch.testing.assert_close(scores[b, :, :count].mean(-1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(scores[b, :, :count].std(-1, correction=0), torch.ones(3), atol=1e-3, rtol=0)
        assert (scores[b, :, count:] == 0).all()


def test_absolute_scores_are_those_of_the_mlp_and_a_number_of_the_head() -> None:
    """Whatever else is in the text; padding is 0."""
    torch.manual_seed(2)
    scorer, features = TokenScorer(2, 3, 10, hidden=7, scale="absolute"), torch.randn(2, 3, 30, 10)
    valid = (torch.arange(30) < torch.tensor([30, 17])[:, None, None]).expand(2, 3, 30)
    before = scorer(1, features, valid)
    torch.testing.assert_close(before, make().raw(1, features).masked_fill(~valid, 0))
    with torch.no_grad():
        scorer.offset[1] = torch.tensor([-7.0, 2.0, 0.5])
    scores = scorer(1, features, valid)
    wanted = before + torch.tensor([-7.0, 2.0, 0.5])[:, None]
    torch.testing.assert_close(scores, wanted.masked_fill(~valid, 0))
    torch.testing.assert_close(scorer(1, features[1:, :, :17], valid[1:, :, :17]), scores[1:, :, :17])
    scores.sum().backward()
    assert scorer.offset.grad.tolist() == [[0.0] * 3, [47.0] * 3]


def test_wrong_scales() -> None:
    with pytest.raises(ValueError, match="expected a scale of standard, absolute, got 'log'"):
        TokenScorer(1, 1, 4, scale="log")


def test_standardise_has_no_nan() -> None:
    assert (standardise(torch.full((2, 5), 3.0), torch.ones(2, 5, dtype=torch.bool)).abs() < 1e-3).all()
    assert (standardise(torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.bool)) == 0).all()


def test_moments_leave_padding_out_and_add_up() -> None:
    features, valid = torch.randn(2, 3, 9, 4), torch.rand(2, 3, 9) > 0.4
    whole = moments(features, valid)
    torch.testing.assert_close(moments(features[:1], valid[:1]) + moments(features[1:], valid[1:]), whole)
    rows = features[:, 1][valid[:, 1]].double()
    torch.testing.assert_close(whole[1], torch.cat([torch.tensor([len(rows)]), rows.sum(0), (rows**2).sum(0)]))


def test_inputs_of_half_precision_are_read_in_float32() -> None:
    scorer, features = make(), torch.randn(2, 3, 20, 10).bfloat16()
    assert torch.equal(scorer.raw(0, features), scorer.raw(0, features.float()))
    assert scorer(0, features, torch.ones(2, 3, 20, dtype=torch.bool)).dtype == torch.float32


def test_inputs_that_never_change_are_no_reason_for_infinity() -> None:
    scorer, features = make(), torch.randn(2, 3, 40, 10)
    features[..., 4] = 2.5
    scorer.fit_input(moments(features, torch.ones(2, 3, 40, dtype=torch.bool)).expand(2, -1, -1))
    torch.testing.assert_close(scorer.deviation[..., 4], torch.full((2, 3), 1e-3))
    assert scorer.raw(0, features).isfinite().all()


def test_moments_are_summed_in_float64() -> None:
    """Small deviations from a large mean, which squares in float32 would lose."""
    scorer, noise = make(), torch.randn(2, 3, 400, 10)
    features = 1000 + noise
    scorer.fit_input(moments(features, torch.ones(2, 3, 400, dtype=torch.bool)).expand(2, -1, -1))
    rows = features.double().transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(scorer.deviation[1].double(), rows.std(1, correction=0), rtol=1e-4, atol=0)


def test_what_was_fitted_is_part_of_the_weights() -> None:
    scorer, features = make(), 3 + 2 * torch.randn(2, 3, 40, 10)
    scorer.fit_input(moments(features, torch.ones(2, 3, 40, dtype=torch.bool)).expand(2, -1, -1))
    again = make()
    again.load_state_dict(scorer.state_dict())
    assert torch.equal(again.raw(1, features), scorer.raw(1, features))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="expected an input of kv, hidden"):
        TokenScorer(1, 1, 4, "queries")
    with pytest.raises(ValueError, match=r"expected features \[B, 3, n, 10\], got \[1, 3, 4, 9\]"):
        make().raw(0, torch.zeros(1, 3, 4, 9))
