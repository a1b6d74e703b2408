"""Scores that policies give in a cache, against the weights that the model's own eager attention has computed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from conversation import Talk, talk, turn
from families import build
from masked import masked_logits, recorded
from torch import Tensor
from transformers import PreTrainedModel

import lkv
from lkv.hf.compat import find_decoder
from lkv.policies import AdaKV, KVzip, Observation, SnapKV

WINDOW, POOLED = 4, 5
TURNS = [turn([47, 31, 9], 6), turn([21, 2, 17], 6, seed=1)]
LENGTH = 47 + 6 + 21 + 6
SEEN = 47, 47 + 6 + 21  # tokens when rows are scored


@dataclass(frozen=True)
class Noting(SnapKV):
    """SnapKV, which records its observations and its scores."""

    window: int = WINDOW
    kernel_size: int = POOLED
    noted: list[tuple[int, Observation, Tensor]] = field(default_factory=list, compare=False)

    def score(self, layer, observation):
        self.noted.append((layer, observation, super().score(layer, observation)))
        return self.noted[-1][2]


@pytest.fixture(params=["nondefault", "gemma2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = copy.deepcopy(build(request.param))
    model.set_attn_implementation("eager")
    return model


def talked(model: PreTrainedModel, policy: lkv.policies.Policy, **options: object) -> tuple[Talk, dict[int, Tensor]]:
    """The conversation, and the weights `[B, Hq, L, L]` that every query paid to the rows that it saw."""
    weights = {}
    cache = lkv.Cache(model, policy, retention=0.4, **options)
    with torch.no_grad(), recorded(cache, 3, LENGTH) as recorder:
        outputs = talk(model, cache, TURNS)
        masked_logits(model, outputs.ids, outputs.mask, recorder.visible, weights)
    return outputs, weights


def of_window(weights: Tensor, mask: Tensor, observed: Observation, b: int, head: int) -> tuple[Tensor, Tensor]:
    """Weights `[G, w, n]` of the last queries of one head's group to its n rows, and where the rows are."""
    seen = observed.query_positions.max() + 1
    last = mask[b, :seen].nonzero().flatten()[-WINDOW:]
    start, count = int(observed.starts[b, head]), int(observed.lengths[b, head])
    rows = slice(start, start + count)
    group = weights.shape[1] // observed.keys.shape[1]
    of_group = weights[b, head * group : (head + 1) * group]
    return of_group[:, last][:, :, observed.positions[b, head, rows].long()], torch.arange(start, start + count)


def pooled(weights: Tensor) -> Tensor:
    """SnapKV by its definition: `[G, w, n]` to `[n]`."""
    group, _, count = weights.shape
    before = max(count - WINDOW, 0)
    padded = torch.zeros(group, before + POOLED - 1)
    padded[:, POOLED // 2 : POOLED // 2 + before] = weights.mean(1)[:, :before]
    scores = torch.zeros(count)
    for row in range(before):
        scores[row] = padded[:, row : row + POOLED].mean(1).mean()
    return scores


@pytest.mark.parametrize("wrapped", [False, True], ids=["snapkv", "adakv"])
def test_what_the_last_queries_pay(model, wrapped):
    """Scores of whole rows after the first turn, of packed ones after the second; with padding."""
    noting = Noting()
    outputs, weights = talked(model, AdaKV(noting) if wrapped else noting)
    assert [int(observed.query_positions.max()) + 1 for _, observed, _ in noting.noted] == sorted(SEEN * 2)
    evicted = sorted(find_decoder(model).readers)
    for rank, observed, scores in noting.noted:
        strongest = KVzip().score(rank, observed)
        for b in range(3):
            for head in range(2):
                paid, rows = of_window(weights[evicted[rank]], outputs.mask, observed, b, head)
                torch.testing.assert_close(scores[b, head, rows], pooled(paid), rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(strongest[b, head, rows], paid.amax((0, 1)), rtol=1e-4, atol=1e-6)
            outside = torch.ones_like(scores[b, 0], dtype=torch.bool)
            outside[rows] = False
            assert (scores[b, 1, outside] == 0).all()


def test_queries_of_several_calls(model):
    """With a prompt in pieces that is scored behind its last one, and tokens of which a window takes some."""
    noting = Noting()
    cache = lkv.Cache(model, noting, retention=0.4, chunks="last")
    with torch.no_grad(), recorded(cache, 3, 47) as recorder, cache.prefill():
        outputs = talk(model, cache, [turn([45, 31, 9], 2)], chunk=11)
    weights = {}
    with torch.no_grad():
        masked_logits(model, outputs.ids, outputs.mask, recorder.visible, weights)
    evicted = sorted(find_decoder(model).readers)
    for rank, observed, scores in noting.noted:
        assert int(observed.query_positions.max()) == 46 and observed.query_mask.all()
        for b in range(3):
            for head in range(2):
                paid, rows = of_window(weights[evicted[rank]], outputs.mask, observed, b, head)
                torch.testing.assert_close(scores[b, head, rows], pooled(paid), rtol=1e-4, atol=1e-6)
    assert len(noting.noted) == 2
