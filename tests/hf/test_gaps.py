"""Padding between the tokens of one call, as a padded batch's second `generate` brings it, and behind whole rows."""

from __future__ import annotations

import pytest
import torch
from conversation import turn
from families import WITHOUT_WINDOWS, build, call, selected
from test_observed import compare, spy, watched
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv.policies import AdaKV, SnapKV, StreamingLLM

FIRST, SECOND = [47, 31, 9, 40], [21, 2, 17, 20]


@pytest.fixture(params=selected(WITHOUT_WINDOWS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


def generate(model: PreTrainedModel, cache: object, ids: Tensor, mask: Tensor, steps: int = 6) -> tuple[Tensor, Tensor]:
    """All tokens with an answer, and which are real."""
    ids = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, past_key_values=cache)
    return ids, torch.cat([mask, mask.new_ones(len(mask), steps)], 1)


def two_answers(model: PreTrainedModel, cache: object, first: list[int], second: list[int]) -> tuple[Tensor, Tensor]:
    one, two = turn(first, 0), turn(second, 0, seed=1)
    ids, mask = generate(model, cache, one.ids, one.mask)
    return generate(model, cache, torch.cat([ids, two.ids], 1), torch.cat([mask, two.mask], 1))


@pytest.mark.parametrize("chunks", ["each", "last"])
def test_second_generate_keeping_all(model, chunks):
    own, mask = two_answers(model, DynamicCache(config=model.config), FIRST, SECOND)
    with lkv.Cache(model, retention=1.0, chunks=chunks) as cache:
        ours, _ = two_answers(model, cache, FIRST, SECOND)
        assert torch.equal(ours, own)
        present = mask.sum(1) - 1  # the last token was never fed
        for layer in cache.ragged:
            assert layer.token_counts == present.tolist() and layer.rows.lengths.tolist() == [
                [n, n] for n in present.tolist()
            ]


@pytest.mark.parametrize("options", [dict(budget=12), dict(retention=0.3), dict(cap=20, interval=5)], ids=str)
@pytest.mark.parametrize("policy", [AdaKV(SnapKV(window=4)), StreamingLLM()], ids=["adakv", "streaming"])
def test_second_generate_as_if_alone(policy, options):
    model = build("llama")
    with lkv.Cache(model, policy, **options) as cache:
        together, mask = two_answers(model, cache, FIRST, SECOND)
    for b in range(4):
        one, two = turn(FIRST, 0), turn(SECOND, 0, seed=1)
        with lkv.Cache(model, policy, **options) as cache:
            ids = one.ids[b : b + 1, one.mask[b] == 1]
            ids, _ = generate(model, cache, ids, torch.ones_like(ids))
            ids = torch.cat([ids, two.ids[b : b + 1, two.mask[b] == 1]], 1)
            ids, _ = generate(model, cache, ids, torch.ones_like(ids))
        assert torch.equal(together[b, mask[b] == 1], ids[0])


def spread(lengths: list[int], count: int) -> Tensor:
    """A mask `[B, count]` of which the real tokens are anywhere."""
    g = torch.Generator().manual_seed(3)
    order = torch.rand(len(lengths), count, generator=g).argsort(1)
    return (order.argsort(1) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("last", [None, 0])
def test_padding_anywhere(model, packed, last):
    """Behind whole rows or packed ones, the logits of real tokens are those of the model's own cache."""
    first, then = turn(FIRST, 0), turn([15] * 4, 0, seed=2).ids
    mask = spread([9, 15, 1, 6], 15)
    if last is not None:
        mask[2:, -1] = last  # padding behind tokens, too
    both = torch.cat([first.mask, mask], 1)
    more = torch.cat([both, torch.ones(4, 1).long()], 1)
    outputs = []
    with torch.no_grad(), lkv.Cache(model, SnapKV(window=4), retention=1.0, chunks="last") as cache:
        for each in (cache, DynamicCache(config=model.config)):
            call(model, first.ids, first.mask, each)
            if packed and each is cache:
                cache.evict()
                assert all(layer.rows is not None for layer in cache.ragged)
            logits = call(model, then, both, each)
            outputs.append((logits[mask.bool()], call(model, then[:, :1], more, each)))
        (ours, next_ours), (own, next_own) = outputs
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(next_ours, next_own, rtol=1e-4, atol=1e-4)
        assert [layer.rows.lengths[:, 0].tolist() for layer in cache.ragged] == [more.sum(1).tolist()] * 2


def test_a_call_with_gaps_that_fails():
    """Whole rows that were packed for it stay packed, and nothing else is left of it."""
    model, first, then = build("llama"), turn(FIRST, 0), turn([15] * 4, 0, seed=2).ids
    mask = torch.cat([first.mask, spread([9, 15, 1, 6], 15)], 1)

    def interrupt(*args: object) -> None:
        raise KeyError

    with torch.no_grad(), lkv.Cache(model, SnapKV(window=4), retention=0.5, chunks="last") as cache:
        call(model, first.ids, first.mask, cache)
        twin = cache.fork()
        hook = model.model.layers[1].input_layernorm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyError):
            call(model, then, mask, cache)
        hook.remove()
        assert cache.get_seq_length() == 47
        with pytest.raises(ValueError, match="lkv.Cache.crop: expected a length of at least 47"):
            cache.crop(-1)
        assert cache.ragged[0].rows is not None and cache.ragged[1].rows is None
        logits = [call(model, then, mask, each)[mask[:, 47:].bool()] for each in (cache, twin)]
        torch.testing.assert_close(*logits)
        mask = torch.cat([mask, torch.ones(4, 1).long()], 1)
        torch.testing.assert_close(*(call(model, then[:, :1], mask, each) for each in (cache, twin)))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_is_observed_of_calls_with_gaps(family):
    """Places count the padding of a call before its tokens, in all that is observed alike."""
    model, first, then, policy = build(family), turn(FIRST, 0), turn([15] * 4, 0, seed=2).ids, spy()
    mask = spread([9, 15, 1, 6], 15)
    both = torch.cat([first.mask, mask], 1)
    with torch.no_grad(), watched(model) as (keys, hidden), lkv.Cache(model, policy, retention=0.5) as cache:
        call(model, first.ids, first.mask, cache)
        call(model, then, both, cache)
    order = mask.argsort(dim=1, stable=True)
    for layer, observations in policy.seen.items():
        k, h = keys[layer], hidden[layer]
        k[1] = k[1].gather(2, order[:, None, :, None].expand_as(k[1]))
        h[1] = h[1].gather(1, order[..., None].expand_as(h[1]))
        for observed in observations:
            compare(observed, k, h, rtol=1e-4, atol=1e-5)
    assert len({id(layer.observations.rotary) for layer in cache.ragged}) == 1
