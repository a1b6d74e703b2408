"""What a cache can do beside `generate`: crop, reorder, select, copy, reset; where its rows are; what it costs."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref

import pytest
import torch
from conversation import Turn, talk, turn
from families import build, call, tokens
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lkv
import lkv_ext
from lkv.hf.layer import RaggedLayer
from lkv.policies import AdaKV, Observation, SnapKV, StreamingLLM

POLICY = AdaKV(SnapKV(window=4))


@pytest.fixture
def model():
    return build("llama")


def answer(model, cache, ids: torch.Tensor, steps: int = 6) -> torch.Tensor:
    """Logits `[B, n + steps, V]` of more tokens and a greedy answer."""
    return talk(model, cache, [Turn(ids, torch.ones_like(ids), steps)]).logits


def test_what_stays_is_what_the_policy_chose(model):
    """From the keys and queries of the model itself, with the selection of the op."""
    ids, seen = tokens(2, 50), {}

    def attention(module, query, key, value, mask, **kwargs):
        seen[module.layer_idx] = query, key, value, kwargs["scaling"]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", attention)
    AttentionMaskInterface.register("spy", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    with torch.no_grad():
        model.config._attn_implementation = "spy"
        call(model, ids, None, DynamicCache(config=model.config))
        model.config._attn_implementation = "sdpa"
        with lkv.Cache(model, POLICY, budget=11) as cache:
            call(model, ids, None, cache)
    # Layer 0 has the same input either way; later layers too, as a prompt is attended to in full.
    for layer in cache.ragged:
        query, key, value, scaling = seen[layer.index]
        everywhere = torch.arange(50).expand(2, 2, 50)
        lengths, starts = torch.full((2, 2), 50), torch.zeros(2, 2, dtype=torch.long)
        last = torch.arange(46, 50).expand(2, 4)
        observed = Observation(
            key, value, everywhere, lengths, starts, query[:, :, -4:], last, torch.ones(2, 4).bool(), scaling
        )
        scores = POLICY.score(layer.index, observed)
        budgets = POLICY.budgets(scores, lengths, torch.tensor([22, 22]))
        kept = lkv_ext.evict(key, value, scores, budgets, window=4)
        rows = layer.rows
        assert torch.equal(rows.lengths, kept.lengths) and int(kept.lengths.sum()) == 44
        for r in range(4):
            count = int(kept.lengths.flatten()[r])
            ours, theirs = (slice(int(x.cu_seqlens[r]), int(x.cu_seqlens[r]) + count) for x in (rows, kept))
            assert torch.equal(rows.positions[ours], kept.positions[theirs])
            assert torch.equal(rows.k[ours], kept.k[theirs]) and torch.equal(rows.v[ours], kept.v[theirs])


def test_a_layer_is_evicted_before_the_next_one_is_reached(model, monkeypatch):
    update, dense = RaggedLayer.update, []

    def watched(layer, keys, values, *args, **kwargs):
        assert all(ref() is None for ref in dense)
        dense.extend(weakref.ref(t.untyped_storage()) for t in (keys, values))
        return update(layer, keys, values, *args, **kwargs)

    monkeypatch.setattr(RaggedLayer, "update", watched)
    with torch.no_grad(), lkv.Cache(model, POLICY, budget=8) as cache:
        call(model, tokens(2, 40), None, cache)
    assert len(dense) == 4


def test_bytes(model):
    row = 2 * 8 * 4  # K and V of 8 floats
    with torch.no_grad(), lkv.Cache(model, POLICY, budget=8, reserve=5) as cache:
        assert cache.nbytes == cache.retained_bytes == 0
        call(model, tokens(3, 40), None, cache)
        heads = 2 * 3 * 2
        assert cache.retained_bytes == heads * 8 * row and cache.nbytes == heads * 13 * row
        call(model, tokens(3, 1), None, cache)
        assert cache.retained_bytes == heads * 9 * row and cache.nbytes == heads * 13 * row


@pytest.mark.parametrize("whole", [False, True])
def test_crop(model, whole):
    """Tokens that were dropped leave no trace; what was evicted does not come back."""
    prompt, wrong, right = tokens(2, 30), tokens(2, 5, seed=1), tokens(2, 4, seed=2)
    chunks = "last" if whole else "each"
    with torch.no_grad(), lkv.Cache(model, StreamingLLM(), budget=10, chunks=chunks) as cache:
        call(model, prompt, None, cache)
        twin = copy.deepcopy(cache)
        for i in range(5):
            call(model, wrong[:, i : i + 1], None, cache) if not whole else None
        if whole:
            call(model, wrong, None, cache)
        assert cache.get_seq_length() == 35
        cache.crop(-3)
        assert cache.get_seq_length() == 32
        cache.crop(-2)
        assert cache.get_seq_length() == 30
        if not whole:
            for drop in (-1, 29):
                with pytest.raises(ValueError, match=r"lkv.Cache.crop: expected a length of at least 30"):
                    cache.crop(drop)
        torch.testing.assert_close(answer(model, cache, right), answer(model, twin, right))


def test_batches_are_selected_repeated_and_reordered(model):
    prompt = turn([30, 17, 25], 3)
    following = tokens(3, 1, seed=3)
    with torch.no_grad(), lkv.Cache(model, POLICY, budget=9) as cache:
        talk(model, cache, [prompt])
        mask = torch.cat([prompt.mask, torch.ones(3, 4)], 1).long()
        expected = call(model, following, mask, copy.deepcopy(cache))
        for order in ([2, 0], [1], [0, 1, 2], [1, 1, 0, 2]):
            some = copy.deepcopy(cache)
            some.batch_select_indices(torch.tensor(order))
            torch.testing.assert_close(call(model, following[order], mask[order], some), expected[order])
        some = copy.deepcopy(cache)
        some.reorder_cache(torch.tensor([2, 2, 1]))
        torch.testing.assert_close(call(model, following[[2, 2, 1]], mask[[2, 2, 1]], some), expected[[2, 2, 1]])
        cache.batch_repeat_interleave(2)
        twice = following.repeat_interleave(2, 0)
        got = call(model, twice, mask.repeat_interleave(2, 0), cache)
        torch.testing.assert_close(got, expected.repeat_interleave(2, 0))


def test_copies_go_on_by_themselves(model):
    prompt, one, other = tokens(1, 40), tokens(1, 7, seed=1), tokens(1, 3, seed=2)
    with torch.no_grad(), lkv.Cache(model, POLICY, retention=0.3) as cache:
        call(model, prompt, None, cache)
        twin = copy.deepcopy(cache)
        first = answer(model, twin, one)
        assert cache.get_seq_length() == 40
        answer(model, cache, other)
        fresh = lkv.Cache(model, POLICY, retention=0.3)
        call(model, prompt, None, fresh)
        assert torch.equal(answer(model, fresh, one), first)


def test_forks_share_whole_rows(model):
    with torch.no_grad(), lkv.Cache(model, POLICY, retention=0.3, chunks="last") as cache:
        call(model, tokens(1, 40), None, cache)
        for mine, other in zip(cache.ragged, cache.fork().ragged, strict=True):
            assert mine.keys.data_ptr() == other.keys.data_ptr() and mine.values.data_ptr() == other.values.data_ptr()


def test_reset(model):
    with torch.no_grad(), lkv.Cache(model, POLICY, budget=9, cap=16) as cache:
        outputs = answer(model, cache, tokens(2, 40), 30)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0
        assert torch.equal(answer(model, cache, tokens(2, 40), 30), outputs)


def test_inference_mode_and_no_grad_may_change(model):
    with lkv.Cache(model, POLICY, budget=9) as cache:
        with torch.inference_mode():
            call(model, tokens(1, 30), None, cache)
            call(model, tokens(1, 1), None, cache)
        with torch.no_grad():
            call(model, tokens(1, 1), None, cache)
            call(model, tokens(1, 3), None, cache)
    assert cache.get_seq_length() == 35


def test_half_precision():
    model = copy.deepcopy(build("llama")).to(torch.bfloat16)
    with lkv.Cache(model, POLICY, retention=1.0) as cache:
        outputs = answer(model, cache, tokens(2, 40))
    dense = answer(model, DynamicCache(config=model.config), tokens(2, 40))
    assert cache.ragged[0].rows.k.dtype == torch.bfloat16
    torch.testing.assert_close(outputs[:, :40], dense[:, :40], rtol=0.05, atol=0.2)


def test_a_compiled_model_gives_the_same(model):
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    original = compiled._orig_mod
    outputs = []
    for each in (original, compiled):
        with torch.no_grad(), lkv.Cache(original, POLICY, budget=9, cap=11, interval=2) as cache:
            ids = tokens(2, 30)
            logits = [each(ids, use_cache=True, past_key_values=cache).logits]
            for i in range(6):
                logits.append(each(tokens(2, 1, seed=i), use_cache=True, past_key_values=cache).logits)
            outputs.append(torch.cat(logits, 1))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_lkv_is_imported_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import lkv, lkv.policies\n"
        "try: lkv.Cache\n"
        "except ImportError as error: assert 'needs transformers' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
