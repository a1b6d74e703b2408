"""Bad input: what was expected and what came, and a cache that is as it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from families import build, call, tokens
from torch import nn

import lkv
from lkv.hf.attention import check_arguments
from lkv.hf.observation import observe
from lkv.policies import SnapKV


@pytest.fixture
def model():
    return build("llama")


@dataclass(frozen=True)
class Wrong(SnapKV):
    """A policy whose answers have another shape, in what `what` names."""

    window: int = 4
    what: str = "scores"

    def score(self, layer, observation):
        scores = super().score(layer, observation)
        return scores[..., 1:] if self.what == "scores" else scores

    def budgets(self, scores, lengths, total, *, starts=None):
        budgets = super().budgets(scores, lengths, total)
        return {"budgets": budgets[:, :1], "fractions": budgets / 2}.get(self.what, budgets)


def untouched(cache: lkv.Cache, length: int = 0) -> bool:
    return cache.get_seq_length() == length and all(layer.get_seq_length() == length for layer in cache.layers)


@pytest.mark.parametrize(
    "what, message",
    [
        ("scores", r"expected scores of .* of shape \[B, H, L\] = \[2, 2, 30\], got \[2, 2, 29\]"),
        ("budgets", r"expected whole budgets of .* of shape \[B, H\] = \[2, 2\], got torch.int64 \[2, 1\]"),
        ("fractions", r"expected whole budgets of .*, got torch.float"),
    ],
)
def test_policies_of_another_shape(model, what, message):
    with torch.no_grad(), lkv.Cache(model, Wrong(what=what), budget=9) as cache:
        with pytest.raises(ValueError, match=f"lkv.Cache: {message}"):
            call(model, tokens(2, 30), None, cache)
        assert untouched(cache)


def test_parts_of_a_layer_that_are_not_there(model):
    with torch.no_grad(), lkv.Cache(model, SnapKV(window=4), budget=9) as cache:
        layer = cache.ragged[0]
        for feed in (False, True):  # no tokens, then packed rows
            if feed:
                call(model, tokens(2, 30), None, cache)
            with pytest.raises(ValueError, match="lkv.Cache: expected whole rows in layer 0, got packed ones or no t"):
                layer.whole()
        for name in ("hidden_states", "pre_rope_keys"):
            with pytest.raises(ValueError, match=f"lkv.Cache: expected {name} to be observed, got none: make the cac"):
                observe(layer, frozenset({name}), 4)
        cache.reset()
        with pytest.raises(ValueError, match="lkv.Cache: expected queries of tokens so far, got none: feed a prompt"):
            layer.observations.queries.read()


@pytest.mark.parametrize("seen", ["whole", "rows"])
def test_tokens_of_another_shape(model, seen):
    with torch.no_grad(), lkv.Cache(model, SnapKV(window=4), budget=9, chunks="last") as cache:
        call(model, tokens(2, 30), None, cache)
        if seen == "rows":
            call(model, tokens(2, 1), None, cache)
        length = cache.get_seq_length()
        with pytest.raises(ValueError, match=r"lkv.Cache: expected keys .* = \[2, 2, n, 8\], got \[3, 2, 4, 8\]"):
            call(model, tokens(3, 4), None, cache)
        assert untouched(cache, length)
        layer = cache.layers[0]
        keys = torch.zeros(2, 2, 1, 8)
        for wrong in (keys.double(), keys.to("meta")):
            with pytest.raises(ValueError, match=r"lkv.Cache: expected keys of torch.float32 on cpu, got torch.float"):
                layer.update(wrong, wrong)
        call(model, tokens(2, 4), None, cache)
        assert untouched(cache, length + 4)


def test_gradients(model):
    with lkv.Cache(model, retention=0.5) as cache:
        with pytest.raises(ValueError, match=r"lkv.Cache: expected a model run under torch.no_grad"):
            call(model, tokens(1, 8), None, cache)
        assert untouched(cache)


def test_keys_of_another_call(model):
    """A forward that hooks do not see, and keys handed over by hand."""
    with torch.no_grad():
        cache = lkv.Cache(model, retention=0.5)
        keys = torch.zeros(1, 2, 8, 8)
        for outside in (
            lambda: model.model.forward(tokens(1, 8), past_key_values=cache, use_cache=True),
            lambda: cache.update(keys, keys, 0),
        ):
            with pytest.raises(ValueError, match="lkv.Cache: expected keys of a forward of the decoder that the cache"):
                outside()
            assert untouched(cache)
        call(model, tokens(1, 8), None, cache)
        assert untouched(cache, 8)


def test_attention_weights(model):
    model = copy.deepcopy(model)  # transformers 4.56 patches modules for this output, and leaves them so on errors
    with torch.no_grad(), lkv.Cache(model, retention=0.5) as cache:
        with pytest.raises(ValueError, match="lkv.Cache: expected attention without output_attentions"):
            model(tokens(1, 8), past_key_values=cache, output_attentions=True)
        assert untouched(cache)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(position_bias=1, head_mask=1), "expected attention without head_mask, position_bias"),
        (dict(sliding_window=512), "expected full attention in layer 3, got a sliding window of 512"),
        (dict(is_causal=False), "expected causal attention"),
        (dict(dropout=0.1), "expected a model in eval mode, got one with dropout"),
    ],
)
def test_attention_of_another_kind(kwargs, message):
    module = nn.Module()
    module.layer_idx = 3
    query = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=f"lkv.Cache: {message}"):
        check_arguments(module, query, None, kwargs)
    check_arguments(module, query[:, :, :1], None, dict(is_causal=False))
    check_arguments(
        module, query, None, dict(dropout=0.0, scaling=1.0, softcap=3.0, sliding_window=None, s_aux=torch.ones(4))
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "expected retention, budget or cap, got none"),
        (dict(retention=0.5, budget=3), "expected one of retention and budget, got both"),
        (dict(retention=0), r"expected retention in \(0, 1\], got 0"),
        (dict(retention=1.5), r"expected retention in \(0, 1\], got 1.5"),
        (dict(budget=0), "expected budget >= 1, got 0"),
        (dict(budget=3, chunks="first"), "expected chunks 'each' or 'last', got 'first'"),
        (dict(cap=8, interval=8), r"expected interval in \[1, cap\) = \[1, 8\), got 8"),
        (dict(cap=1), "expected interval in"),
        (dict(budget=3, reserve=0), "expected reserve >= 1, got 0"),
        (dict(budget=3, policy="h3o"), "expected one of adakv, cake, .*, tova, got 'h3o'"),
    ],
)
def test_settings(model, options, message):
    own = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        lkv.Cache(model, **options)
    assert model.config._attn_implementation == own


def test_policies_that_need_more_than_there_is(model):
    class Twice(SnapKV):
        needs = frozenset({"second_pass", "queries"})

    with pytest.raises(ValueError, match=r"got .*Twice.*, which needs a second pass over its text: lkv.compress"):
        lkv.Cache(model, Twice(), retention=0.5)
    with pytest.raises(TypeError, match=r"expected a name or a policy"):
        lkv.Cache(model, 3, retention=0.5)


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("reserve", [1, 64])
def test_a_policy_that_fails_later_leaves_its_turn_out(model, reserve, left):
    """The rows of a turn whose scores fail are taken back."""
    mask = torch.ones(2, 35, dtype=torch.long)
    mask[1, 30 : 30 + left] = 0
    with torch.no_grad(), lkv.Cache(model, SnapKV(window=4), budget=9, reserve=reserve) as cache:
        call(model, tokens(2, 30), None, cache)
        twin = copy.deepcopy(cache)
        cache.settings = replace(cache.settings, policy=Wrong())
        with pytest.raises(ValueError, match="expected scores of"):
            call(model, tokens(2, 5), mask, cache)
        assert untouched(cache, 30)
        cache.settings = replace(cache.settings, policy=SnapKV(window=4))
        assert torch.equal(call(model, tokens(2, 5), mask, cache), call(model, tokens(2, 5), mask, twin))


@pytest.mark.parametrize("cap, interval", [(2, 1), (7, 1), (8, 1), (15, 1), (16, 2), (80, 10)])
def test_the_interval_is_an_eighth_of_the_cap(model, cap, interval):
    with lkv.Cache(model, cap=cap) as cache:
        assert cache.settings.interval == interval
