"""What policies score in a cache is the attention of the model itself, with the settings that are its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from own_settings import MODELS, build, tokens
from torch import Tensor

from lkv.hf import Cache
from lkv.policies import AdaKV, Observation, Policy, SnapKV

WINDOW, LENGTHS = 5, [31, 18, 3]


@dataclass(frozen=True)
class Noted(SnapKV):
    """Writes its scores down."""

    window: int = WINDOW
    kernel_size: int = 1
    noted: dict[int, Tensor] = field(default_factory=dict)

    def score(self, layer: int, observation: Observation) -> Tensor:
        self.noted[layer] = super().score(layer, observation)
        return self.noted[layer]


@pytest.mark.parametrize("around", [lambda scorer: scorer, AdaKV], ids=["snapkv", "adakv"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_models_weights(name: str, around: type[Policy]) -> None:
    """Texts side by side, padded in front, each as the model weighs its rows where it reads the text alone."""
    model, scorer = build(name), Noted()
    texts = [tokens(1, n, seed=n)[0] for n in LENGTHS]
    ids = torch.stack([torch.nn.functional.pad(text, (LENGTHS[0] - len(text), 0)) for text in texts])
    mask = (torch.arange(LENGTHS[0]) >= LENGTHS[0] - torch.tensor(LENGTHS)[:, None]).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), Cache(model, around(scorer), retention=0.5) as cache:
        model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
    for b, text in enumerate(texts):
        attentions = model(text[None], output_attentions=True, use_cache=False).attentions
        for layer, weights in enumerate(attentions):
            paid = weights[0, :, -WINDOW:].mean(1).unflatten(0, (model.config.num_key_value_heads, -1)).mean(1)
            paid[:, max(len(text) - WINDOW, 0) :] = 0
            got = scorer.noted[layer][b, :, LENGTHS[0] - len(text) :]
            torch.testing.assert_close(got, paid, rtol=1e-4, atol=1e-5)


def test_models_differ_in_every_setting() -> None:
    """What these tests rest on: none has a scale, cap or group by default, and sinks are not small."""
    attention = {name: build(name).model.layers[0].self_attn for name in MODELS}
    assert attention["scale"].scaling == 0.7 and attention["scale and soft cap"].scaling == 3**-0.5
    assert attention["scale and soft cap"].attn_logit_softcapping == 1.5
    assert attention["sinks"].sinks.abs().mean() > 0.5
    groups = {name: build(name).config.num_attention_heads // build(name).config.num_key_value_heads for name in MODELS}
    assert groups["one head"] == 3 and groups["no groups"] == 1
    assert build("scaled rotations").model.rotary_emb.attention_scaling > 1.1
    rotated = build("part of a head rotated")
    assert rotated.model.rotary_emb.inv_freq.shape[0] * 4 == rotated.model.layers[0].self_attn.head_dim
