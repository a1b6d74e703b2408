"""Rotations that are not the default: scaled, stretched, of a part of a head, and such as change with the length."""

from __future__ import annotations

import pytest
import torch
from conversation import talk, turn
from families import variant
from masked import masked_logits, recorded
from test_observed import check
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv.policies import AdaKV, SnapKV

TURNS = [turn([47, 31, 9], 6), turn([21, 2, 17], 6, seed=1)]
LENGTH = 47 + 6 + 21 + 6
BASE = dict(rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
PARTIAL = dict(hidden_size=64, partial_rotary_factor=0.5)
ROPES = {
    "linear": ("llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0, **BASE))),
    "llama3": ("llama", dict(rope_scaling=dict(original_max_position_embeddings=32, **LLAMA3, **BASE))),
    "yarn": (
        "llama",
        dict(rope_scaling=dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=512, **BASE)),
    ),
    "dynamic": ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0, **BASE), max_position_embeddings=40)),
    "partial": ("phi3", PARTIAL),
    "longrope": (
        "phi3",
        dict(
            rope_scaling=dict(type="longrope", short_factor=[1.0] * 4, long_factor=[3.0] * 4),
            original_max_position_embeddings=40,
            **PARTIAL,
        ),
    ),
}
WITH_THE_LENGTH = ("dynamic", "longrope")  # keys stay as they were rotated when they came


@pytest.fixture(params=ROPES)
def rope(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_is_kept_and_what_is_not(rope):
    """All kept equals the model's own cache, a third kept the same tokens at once with the others masked."""
    model, twin = made(rope), made(rope)  # its rotations are a state of the model where they follow the length
    dense = talk(twin, DynamicCache(config=twin.config), TURNS)
    present = dense.mask.bool()
    ours = talk(model, lkv.Cache(model, retention=1.0), TURNS)
    torch.testing.assert_close(ours.logits[present], dense.logits[present], rtol=1e-4, atol=1e-4)
    if rope in WITH_THE_LENGTH:
        return
    cache = lkv.Cache(model, AdaKV(SnapKV(window=4)), retention=0.3)
    with torch.no_grad(), recorded(cache, 3, LENGTH) as recorder:
        outputs = talk(model, cache, TURNS)
        expected = masked_logits(model, outputs.ids, outputs.mask, recorder.visible)
    torch.testing.assert_close(outputs.logits[present], expected[present], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["one", "padded"])
def test_keys_before_they_were_rotated(rope, shape):
    check(made(rope), shape)


def test_rotations_are_not_the_default():
    """Or this file would test nothing."""
    rotary = {name: made(name).model.rotary_emb for name in ROPES}
    plain = {name: variant(family).model.rotary_emb for name, (family, _) in ROPES.items()}
    scaled = {name for name, each in rotary.items() if each.attention_scaling > 1.1}
    assert scaled == {"yarn", "longrope"}
    for name in ("linear", "llama3", "yarn"):
        assert not torch.equal(rotary[name].inv_freq, plain[name].inv_freq)
    for name in ("partial", "longrope"):
        assert rotary[name].inv_freq.shape[0] * 4 == made(name).model.layers[0].self_attn.head_dim
    for name in WITH_THE_LENGTH:
        model = made(name)
        before = model.model.rotary_emb.inv_freq.clone()
        talk(model, DynamicCache(config=model.config), [turn([47], 0)])
        assert not torch.equal(model.model.rotary_emb.inv_freq, before)


def made(rope: str) -> PreTrainedModel:
    family, options = ROPES[rope]
    return variant(family, **options)
