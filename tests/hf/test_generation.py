"""Every family: all kept equals the model's own cache, and what is evicted is as if it had been masked."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conversation import Talk, Turn, talk, turn
from families import FAMILIES, HEADS, build, selected
from masked import masked_logits, recorded
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv.policies import AdaKV, SnapKV, StreamingLLM

ONE, FOUR = [47], [47, 31, 9, 40]
TURNS = {
    "one": [turn(ONE, 12)],
    "padded, two turns": [turn(FOUR, 9), turn([21, 2, 17, 20], 9, seed=1)],
}
CHUNK = 13


@pytest.fixture(params=selected(FAMILIES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


def own_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def present(outputs: Talk) -> torch.Tensor:
    return outputs.logits[outputs.mask.bool()]


def evicting(model: PreTrainedModel, turns: list[Turn], chunk: int | None, **options: object) -> tuple[Talk, lkv.Cache]:
    """Talks through a cache of ours and checks every logit against the masked reference."""
    length = sum(t.ids.shape[1] + t.steps for t in turns)
    with lkv.Cache(model, **options) as cache, recorded(cache, len(turns[0].ids), length) as recorder:
        outputs = talk(model, cache, turns, chunk)
    expected = masked_logits(model, outputs.ids, outputs.mask, recorder.visible)
    assert cache.get_seq_length() == length
    torch.testing.assert_close(present(outputs), expected[outputs.mask.bool()], rtol=1e-4, atol=1e-4)
    return outputs, cache


@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize("turns", TURNS)
def test_all_kept(model, turns, chunk):
    dense = talk(model, own_cache(model), TURNS[turns], chunk)
    for chunks in ("each", "last"):
        with lkv.Cache(model, retention=1.0, chunks=chunks) as cache:
            ours = talk(model, cache, TURNS[turns], chunk)
        assert torch.equal(ours.ids, dense.ids)
        torch.testing.assert_close(present(ours), present(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk, chunks", [(None, "each"), (CHUNK, "each"), (CHUNK, "last")])
@pytest.mark.parametrize("turns", TURNS)
def test_a_sixth_kept(model, turns, chunk, chunks):
    policy = AdaKV(SnapKV(window=4))
    outputs, cache = evicting(model, TURNS[turns], chunk, policy=policy, retention=0.15, chunks=chunks)
    *before, last = TURNS[turns]
    earlier = sum(t.mask.sum(1) + t.steps for t in before)
    behind = chunks == "last"  # the first token of the answer
    logical = earlier + last.mask.sum(1) + behind
    for layer in cache.ragged:
        kept = layer.rows.lengths.sum(1) - HEADS * (last.steps - behind)
        assert kept.tolist() == [2 * max(1, round(0.15 * int(n))) for n in logical]
    dense = talk(model, own_cache(model), TURNS[turns], chunk)
    assert (outputs.logits - dense.logits).abs().max() > 0.05  # evicting shows


def test_capped(model):
    """Over many tokens, never more rows than the cap."""
    capped(model, [turn(ONE, 500 if model is build("llama") else 90)], SnapKV(window=8))


@pytest.mark.parametrize("policy", [StreamingLLM(sink=2), SnapKV(window=8), AdaKV(SnapKV(window=4))], ids=str)
def test_capped_in_a_padded_batch(model, policy):
    capped(model, [turn(FOUR, 60)], policy)


def capped(model: PreTrainedModel, turns: list[Turn], policy: lkv.policies.Policy, cap: int = 48) -> None:
    batch, length = len(turns[0].ids), turns[0].ids.shape[1] + turns[0].steps
    counts = []  # rows of the fullest sequence in each layer, after every call
    with lkv.Cache(model, policy, cap=cap, interval=16) as cache, recorded(cache, batch, length) as recorder:
        hook = model.register_forward_hook(
            lambda *_: counts.append([int(layer.rows.lengths.sum(1).max()) for layer in cache.ragged])
        )
        outputs = talk(model, cache, turns)
        hook.remove()
    assert all(2 * (cap - 16) <= n <= 2 * cap for rows in counts[cap:] for n in rows)
    assert max(map(max, counts)) == 2 * cap
    assert sum(a > b for a, b in pairwise(rows[0] for rows in counts)) >= turns[0].steps // 17
    expected = masked_logits(model, outputs.ids, outputs.mask, recorder.visible)
    wanted = expected[outputs.mask.bool()]
    torch.testing.assert_close(present(outputs), wanted, rtol=1e-3, atol=1e-3)  # a few of many, after many steps
    assert (present(outputs) - wanted).abs().mean() < 1e-5


def test_a_padded_sequence_goes_on_as_if_alone(model):
    policy = AdaKV(SnapKV(window=4))
    turns = TURNS["padded, two turns"]
    if True in own_cache(model).is_sliding:  # windows count the padding between two turns
        turns = turns[:1]
    together, _ = evicting(model, turns, None, policy=policy, budget=12)
    for b in range(4):
        alone = [Turn(t.ids[b : b + 1, t.mask[b] == 1], t.mask[b : b + 1, t.mask[b] == 1], t.steps) for t in turns]
        with lkv.Cache(model, policy, budget=12) as cache:
            single = talk(model, cache, alone)
        assert torch.equal(together.ids[b, together.mask[b] == 1], single.ids[0])


@pytest.mark.parametrize("retention", [1.0, 0.15])
@pytest.mark.parametrize("sampling", [dict(do_sample=False), dict(do_sample=True), dict(num_beams=3, do_sample=False)])
def test_generate(model, sampling, retention):
    """transformers' own loop: greedy, sampling and beams, padded; then a second turn of the first sequence."""
    one = turn(FOUR, 0)
    options = dict(attention_mask=one.mask, max_new_tokens=12, **sampling)

    def answer(**more: object) -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(one.ids, **options, **more)

    with lkv.Cache(model, SnapKV(window=4), retention=retention) as cache:
        outputs = answer(past_key_values=cache)
        assert cache.get_seq_length() == outputs.shape[1] - 1
        if retention == 1.0:
            assert torch.equal(outputs, answer())
        else:
            torch.manual_seed(5)
            talked = outputs[:, one.ids.shape[1] :]
            assert talked.shape == (4, 12) and not torch.equal(outputs, answer())


def test_generate_in_turns(model):
    first = turn(ONE, 0)

    def answer(ids: torch.Tensor, **more: object) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **more)

    with lkv.Cache(model, SnapKV(window=4), retention=1.0) as cache:
        again = torch.cat([answer(first.ids, past_key_values=cache), turn([15], 0, seed=2).ids], 1)
        ours = answer(again, past_key_values=cache)
    assert torch.equal(ours, answer(again))


@pytest.mark.parametrize("chunks", ["each", "last"])
def test_generate_in_chunks(model, chunks):
    """transformers' own chunks, beside its own cache in the same chunks."""
    ids = turn(ONE, 0).ids
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, prefill_chunk_size=16)
    with lkv.Cache(model, retention=1.0, chunks=chunks) as cache:
        ours = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(ours, model.generate(ids, past_key_values=own_cache(model), **options))
