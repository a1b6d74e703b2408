"""The model's attention: switched while a cache of it is alive, the model's own for everybody else, restored."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, build, tokens
from transformers import DynamicCache

import lkv


def test_the_model_gets_its_attention_back():
    model = build("llama")
    own = model.config._attn_implementation
    first = lkv.Cache(model, retention=0.5)
    second = lkv.Cache(model, "streaming_llm", budget=8)
    assert model.config._attn_implementation == f"lkv_{own}"
    first.close()
    first.close()
    assert model.config._attn_implementation == f"lkv_{own}"
    del second  # nobody else holds it
    assert model.config._attn_implementation == own
    with lkv.Cache(model.model, retention=0.5):
        assert model.config._attn_implementation == f"lkv_{own}"
    assert model.config._attn_implementation == own


def test_a_copy_holds_the_attention_too():
    model = build("llama")
    own = model.config._attn_implementation
    cache = lkv.Cache(model, retention=0.5)
    twin = copy.deepcopy(cache)
    del cache
    assert model.config._attn_implementation == f"lkv_{own}"
    del twin
    assert model.config._attn_implementation == own


def test_another_attention_chosen_in_the_meantime_stays():
    model = copy.deepcopy(build("llama"))
    cache = lkv.Cache(model, retention=0.5)
    model.set_attn_implementation("eager")
    cache.close()
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_caches_see_the_models_own_attention(family, attention):
    model = copy.deepcopy(build(family))
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention} in this transformers")
    ids = tokens(2, 30)
    ids[0, :9] = 0
    mask = (ids != 0).long()

    def logits() -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                model(ids, attention_mask=mask, use_cache=False).logits,
                model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits,
                model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False),
            ]

    before = logits()
    with lkv.Cache(model, retention=0.5) as cache:
        assert all(map(torch.equal, logits(), before))
        ours = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=cache)
        assert ours.shape == before[2].shape and cache.get_seq_length() == 34
        assert all(map(torch.equal, logits(), before))
    assert all(map(torch.equal, logits(), before))


def test_gradients_flow_beside_a_cache():
    model = copy.deepcopy(build("llama"))
    with lkv.Cache(model, retention=0.5):
        model(tokens(1, 8), use_cache=False).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
