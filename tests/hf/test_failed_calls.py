"""A call that fails somewhere has not been: all layers are as before it, or the cache refuses to go on."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conversation import turn
from families import build, call, tokens
from snapshots import differences, snapshot
from torch import Tensor, nn

import lkv
import lkv_ext
from lkv.policies import H2O, Carried, SnapKV, SqueezeAttention, StreamingLLM


class Flaky:
    """SnapKV, which fails in one layer as long as `fails` names it."""

    needs = frozenset({"queries"})
    sink, window = 0, 4

    def __init__(self, scope: str = "layer", fails: int | None = None) -> None:
        self.scope, self.fails = scope, fails

    def score(self, layer, observation):
        if layer == self.fails:
            raise RuntimeError("no scores today")
        return SnapKV(window=4).score(layer, observation)

    def budgets(self, scores, lengths, total, *, starts=None):
        across = "heads" if isinstance(scores, Tensor) else "layers"
        return lkv_ext.budgets_from_scores(scores, total, across=across, lengths=lengths, starts=starts, window=4)


@pytest.fixture
def model():
    return build("llama")


def lengths(cache: lkv.Cache) -> set[int]:
    return {cache.get_seq_length(), *(layer.get_seq_length() for layer in cache.layers)}


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("chunks", ["each", "last"])
def test_a_policy_that_fails_in_the_last_layer(model, chunks, scope):
    """At the prompt, at the first token behind it, and in `evict`: everything is as before."""
    policy, prompt = Flaky(scope=scope), turn([30, 22], 0)
    with torch.no_grad(), lkv.Cache(model, policy, budget=9, chunks=chunks) as cache:
        policy.fails = 1
        if chunks == "each":
            with pytest.raises(RuntimeError, match="no scores today"):
                call(model, prompt.ids, prompt.mask, cache)
            assert lengths(cache) == {0} and cache.nbytes == 0
        else:
            call(model, prompt.ids, prompt.mask, cache)
            mask = torch.cat([prompt.mask, torch.ones(2, 1).long()], 1)
            for failing in (lambda: call(model, tokens(2, 1), mask, cache), cache.evict):
                with pytest.raises(RuntimeError, match="no scores today"):
                    failing()
                assert lengths(cache) == {30} and [layer.rows for layer in cache.ragged] == [None, None]
            cache.reset()
        policy.fails = None
        outputs = [call(model, prompt.ids, prompt.mask, c) for c in (cache, lkv.Cache(model, policy, budget=9))]
        assert torch.equal(*outputs)


def test_a_later_turn_of_which_rows_are_gone(model):
    """Scope "layer" has evicted layer 0 when layer 1 fails; with scope "model" nobody has."""
    for scope in ("layer", "model"):
        policy = Flaky(scope=scope)
        with torch.no_grad(), lkv.Cache(model, policy, budget=9) as cache:
            call(model, tokens(2, 30), None, cache)
            twin = copy.deepcopy(cache)
            policy.fails = 1
            with pytest.raises(RuntimeError, match="no scores today"):
                call(model, tokens(2, 5), None, cache)
            policy.fails = None
            if scope == "model":
                assert lengths(cache) == {30}
                assert torch.equal(*(call(model, tokens(2, 5), None, c) for c in (cache, twin)))
                continue
            for _ in range(2):
                with pytest.raises(ValueError, match="got one of which layer 0 had been evicted when its last call"):
                    call(model, tokens(2, 5), None, cache)
            cache.reset()
            call(model, tokens(2, 30), None, cache)
            assert torch.equal(*(call(model, tokens(2, 5), None, c) for c in (cache, twin)))


class Interrupted(Exception):
    pass


def interrupt(module: nn.Module, *args: object) -> None:
    raise Interrupted


@pytest.mark.parametrize("policy", [SnapKV(window=4), StreamingLLM()], ids=["snapkv", "streaming"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_that_fails_between_its_layers(family, padded, policy):
    """At a prompt, a chunk of it, a token, the token at which the slack is used up, several on packed rows."""
    model = build(family)
    if family == "gemma3":
        padded = False
    mask = torch.ones(2, 60).long()
    if padded:
        mask[0, :7] = mask[1, :3] = mask[1, 26:28] = mask[0, 37:39] = 0
    cuts = [0, 20, 26, 33, 34, 35, 36, 37, 42, 43]
    ids = tokens(2, 60) * mask
    with torch.no_grad():
        cache = lkv.Cache(model, policy, budget=9, chunks="last", reserve=2)
        twin = lkv.Cache(model, policy, budget=9, chunks="last", reserve=2)
        for a, b in pairwise(cuts):
            shown = mask[:, :b] if padded else None
            hook = model.get_decoder().layers[-1].input_layernorm.register_forward_pre_hook(interrupt)
            with pytest.raises(Interrupted):
                call(model, ids[:, a:b], shown, cache)
            hook.remove()
            assert cache.get_seq_length() == a
            ours, theirs = (call(model, ids[:, a:b], shown, c) for c in (cache, twin))
            present = mask[:, a:b].bool()
            torch.testing.assert_close(ours[present], theirs[present])
            for one, other in zip(cache.ragged, twin.ragged, strict=True):
                assert (one.token_counts, one.row_counts, one.evicted, one.due) == (
                    other.token_counts,
                    other.row_counts,
                    other.evicted,
                    other.due,
                )
                if one.rows is not None:
                    assert torch.equal(one.rows.lengths, other.rows.lengths) and one.rows.seen == other.rows.seen
    for each in (cache, twin):
        each.close()


class Counting(StreamingLLM):
    """Carries how many rows each head has had."""

    def accumulate(self, layer, observation, before):
        counts = observation.lengths[..., None]
        return Carried(heads=counts if before is None else counts + before.heads)


@pytest.mark.parametrize("place", ["k_proj", "o_proj"])
@pytest.mark.parametrize(
    "policy", [Counting(), H2O(), SqueezeAttention(SnapKV(window=4))], ids=lambda p: type(p).__name__
)
def test_nothing_is_left_of_what_policies_look_at(model, policy, place):
    """In a layer whose keys have not come yet, and in one that has attended; the other one has been evicted."""
    prompt, module = turn([30, 22], 0), getattr(model.model.layers[-1].self_attn, place)
    longer = torch.cat([prompt.mask, torch.ones(2, 1).long()], 1)
    with torch.no_grad(), lkv.Cache(model, policy, retention=0.5) as cache:
        for ids, mask in ((prompt.ids, prompt.mask), (tokens(2, 1), longer)):
            before, hook = snapshot(cache), module.register_forward_pre_hook(interrupt)
            with pytest.raises(Interrupted):
                call(model, ids, mask, cache)
            hook.remove()
            assert differences(snapshot(cache), before) == []
            call(model, ids, mask, cache)


def test_settings_that_were_wrong_for_a_moment(model):
    with torch.no_grad(), lkv.Cache(model, SnapKV(window=4), budget=9, cap=12, interval=2) as cache:
        call(model, tokens(1, 30), None, cache)
        for i in range(3):
            call(model, tokens(1, 1, seed=i), None, cache)
        twin, good = copy.deepcopy(cache), cache.settings
        cache.settings = replace(good, policy=Flaky(fails=1))
        with pytest.raises(RuntimeError, match="no scores today"):
            call(model, tokens(1, 1, seed=9), None, cache)  # at the cap
        assert lengths(cache) == {33} and cache.ragged[0].rows.lengths.tolist() == [[12, 12]]
        cache.settings = good
        assert torch.equal(*(call(model, tokens(1, 1, seed=9), None, c) for c in (cache, twin)))
