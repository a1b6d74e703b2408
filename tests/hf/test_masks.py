"""The mask is the truth: what it hides leaves the rows, and what rows cannot follow is refused beforehand."""

from __future__ import annotations

import copy

import pytest
import torch
from conversation import turn
from families import FAMILIES, build, call, places, selected, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import lkv
from lkv.hf import masks
from lkv.policies import AdaKV, SnapKV, StreamingLLM

POLICY = AdaKV(SnapKV(window=4))
LOWEST = torch.finfo(torch.float32).min
CHUNKS = pytest.mark.parametrize("chunks", ["each", "last"])


@pytest.fixture(params=selected(FAMILIES))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama")


def snapshot(cache: lkv.Cache) -> list[object]:
    return [
        (
            layer.token_counts,
            layer.row_counts,
            layer.evicted,
            layer.evictions,
            layer.due,
            layer.get_seq_length(),
            layer.rows is None,
        )
        for layer in cache.ragged
    ]


def both(model: PreTrainedModel, chunks: str = "each") -> tuple[DynamicCache, lkv.Cache]:
    return DynamicCache(config=model.config), lkv.Cache(model, POLICY, retention=1.0, chunks=chunks)


@CHUNKS
def test_tokens_that_a_later_call_hides(any_model, chunks):
    """What ended early in a batch, and some in the middle; twice; then a token more."""
    ids, outputs = tokens(3, 40), []
    mask = torch.ones(3, 40).long()
    mask[0, :5] = 0
    with torch.no_grad():
        for cache in both(any_model, chunks):
            shown, logits = mask.clone(), []
            for begin, end, hides in (
                (0, 20, None),
                (20, 30, (1, slice(16, 20))),
                (30, 39, (2, slice(7, 23))),
                (39, 40, None),
            ):
                if hides is not None:
                    shown[hides] = 0
                logits.append(call(any_model, ids[:, begin:end], shown[:, :end], cache))
            outputs.append(torch.cat(logits, 1)[:, 20:])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    hidden = (shown[:, :40] == 0).sum(1)
    for layer in cache.ragged:
        assert layer.token_counts == (40 - hidden).tolist() and layer.row_counts == (2 * (40 - hidden)).tolist()
        assert layer.rows.lengths.sum(1).tolist() == layer.row_counts and layer.evictions == 2


def test_a_batched_chat_after_an_early_end(any_model):
    """The whole flow with generate: it pads the sequence that ended, and the next turn's mask hides these pads."""
    first, second = tokens(2, 20, 3), tokens(2, 6, 4)
    free = any_model.generate(first, max_new_tokens=12, do_sample=False)
    eos = next((t for t in free[1, 20:26].tolist() if t not in free[0, 20:].tolist()), None)
    if eos is None:
        pytest.skip("both sequences say the same")
    outputs = []
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)
    for cache in both(any_model):
        one = any_model.generate(first, past_key_values=cache, **options)
        pads = (one == 0) & (torch.arange(one.shape[1]) >= 20)
        mask = torch.cat([(~pads).long(), torch.ones(2, 6).long()], 1)
        ids = torch.cat([one, second], 1)
        outputs.append(
            any_model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, past_key_values=cache)
        )
    assert torch.equal(*outputs)


@CHUNKS
@pytest.mark.parametrize("policy", [POLICY, StreamingLLM(sink=2), SnapKV(window=8)], ids=str)
def test_policies_see_no_hidden_token(model, policy, chunks):
    """After the last tokens were hidden, what is kept is what a cache without them keeps."""
    ids, then = tokens(2, 40), tokens(2, 9, seed=2)
    mask = torch.ones(2, 49).long()
    mask[1, 30:40] = 0
    with torch.no_grad():
        together = lkv.Cache(model, policy, retention=1.0, chunks="last", observe={"queries"}, observe_window=8)
        call(model, ids, None, together)
        if chunks == "each":
            together.evict()
        call(model, then, mask, together)
        alone = lkv.Cache(model, policy, retention=1.0, chunks="last", observe={"queries"}, observe_window=8)
        call(model, torch.cat([ids[1:, :30], then[1:]], 1), None, alone)
        for cache in (together, alone):
            cache.evict(policy, budget=12)
    for one, other in zip(together.ragged, alone.ragged, strict=True):
        assert torch.equal(one.rows.lengths[1:], other.rows.lengths)
        kept = one.rows.padded(one.rows.positions)[1], other.rows.padded(other.rows.positions)[0]
        for mine, its, count in zip(*kept, other.rows.lengths[0].tolist(), strict=True):
            mine = mine[:count]
            assert not ((mine >= 30) & (mine < 40)).any()
            assert torch.equal(torch.where(mine >= 40, mine - 10, mine), its[:count])


@pytest.mark.parametrize(
    "mask, message",
    [
        (lambda m: torch.ones_like(m), "expected tokens that attention_mask has once hidden to stay so"),
        (lambda m: None, "expected attention_mask of all tokens, as earlier ones hid some, got none"),
        (
            lambda m: m[:, 1:],
            r"expected attention_mask of all tokens, cached and new, \[B, L\] = \[2, 35\], got \[2, 34\]",
        ),
        (lambda m: m[:, -5:], r"\[B, L\] = \[2, 35\], got \[2, 5\]"),
        (lambda m: m[None], r"expected attention_mask of shape \[B, L\] or \[B, H, n, L\], got \[1, 2, 35\]"),
        (lambda m: torch.ones(2, 1, 5, 34), r"of shape \[B, H, n, L\] = \[2, H, 5, 35\], got \[2, 1, 5, 34\]"),
        (lambda m: torch.ones(3, 1, 5, 35), r"of shape \[B, H, n, L\] = \[2, H, 5, 35\], got \[3, 1, 5, 35\]"),
    ],
)
@CHUNKS
def test_masks_that_are_refused(model, chunks, mask, message):
    prompt = turn([30, 22], 0)
    with torch.no_grad():
        cache = lkv.Cache(model, POLICY, retention=0.5, chunks=chunks)
        call(model, prompt.ids, prompt.mask, cache)
        before, twin = snapshot(cache), cache.fork()
        right = torch.cat([prompt.mask, torch.ones(2, 5).long()], 1)
        with pytest.raises((ValueError, TypeError), match=message):
            model(tokens(2, 5), attention_mask=mask(right), past_key_values=cache)
        assert snapshot(cache) == before
        assert torch.equal(*(call(model, tokens(2, 5), right, each) for each in (cache, twin)))


def tree(count: int, seen: int) -> Tensor:
    """Candidates for the next token: each sees what was there and itself."""
    shown = torch.ones(count, seen + count).bool()
    shown[:, seen:] = torch.eye(count).bool()
    return shown[None, None]


def documents(count: int, seen: int) -> Tensor:
    """Two in one row, that do not see each other."""
    shown = torch.ones(count, seen + count).bool().tril(seen)
    shown[count // 2 :, : seen + count // 2] = False
    return shown[None, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("make", [tree, documents])
def test_other_masks_on_whole_rows(any_model, make, additive):
    mask, outputs = make(6, 24), []
    mask = torch.zeros(mask.shape).masked_fill(~mask, LOWEST) if additive else mask
    if any_model.config._attn_implementation == "eager" and not additive:
        pytest.skip("eager attention adds its mask")
    with torch.no_grad():
        for cache in both(any_model, "last"):
            call(any_model, tokens(2, 24), None, cache)
            given = mask.expand(2, -1, -1, -1)
            if True in cache.is_sliding:
                place = torch.arange(9, 30)  # of the keys in a window of 16 that the six queries see
                window = (place <= place[-6:, None]) & (place > place[-6:, None] - 16)
                window = torch.zeros(6, 21).masked_fill(~window, LOWEST) if additive else window
                given = {"full_attention": given, "sliding_attention": window[None, None]}
            outputs.append(any_model(tokens(2, 6, seed=1), attention_mask=given, past_key_values=cache).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [tree, documents])
def test_other_masks_on_packed_rows(model, make):
    cache = lkv.Cache(model, POLICY, retention=0.5)
    with torch.no_grad():
        call(model, tokens(2, 24), None, cache)
        before, twin = snapshot(cache), cache.fork()
        for mask in (make(6, 24), {"full_attention": make(6, 24)}, torch.zeros(1, 1, 6, 30) - 0.5):
            with pytest.raises(
                ValueError, match="lkv.Cache: expected a causal mask, but for hidden tokens, where rows"
            ):
                model(tokens(2, 6), attention_mask=mask, past_key_values=cache)
            assert snapshot(cache) == before
        assert torch.equal(*(call(model, tokens(2, 6), None, each) for each in (cache, twin)))


@CHUNKS
@pytest.mark.parametrize("additive", [False, True])
def test_a_square_mask_that_hides_what_a_flat_one_does(model, chunks, additive):
    prompt, more = turn([30, 22], 0), tokens(2, 5, seed=1)
    flat = torch.cat([prompt.mask, torch.ones(2, 5).long()], 1)
    flat[1, 25:28] = 0
    square = torch.ones(5, 35).bool().tril(30)[None, None] & flat.bool()[:, None, None]
    if additive:
        square = torch.zeros(square.shape).masked_fill(~square, -torch.inf)
    with torch.no_grad():
        cache = lkv.Cache(model, POLICY, retention=0.5, chunks=chunks)
        call(model, prompt.ids, prompt.mask, cache)
        twin = cache.fork()
        options = dict(position_ids=places(flat)[:, -5:], use_cache=True)
        outputs = model(more, attention_mask=square, past_key_values=cache, **options).logits
        torch.testing.assert_close(outputs, call(model, more, flat, twin), rtol=1e-4, atol=1e-4)
    assert snapshot(cache) == snapshot(twin)


@CHUNKS
@pytest.mark.parametrize("retention", [1.0, 0.4])
def test_padding_on_the_right_of_a_first_call(any_model, chunks, retention):
    """Each sequence as if it were alone, for an answer and a second turn; then chunks with gaps."""
    lengths, sliding = [30, 17, 24], "sliding_attention" in (getattr(any_model.config, "layer_types", None) or ())
    if sliding:
        lengths = [30] * 3  # windows count the padding behind a sequence
    ids, then = tokens(3, 30), tokens(3, 6, seed=1)
    mask = (torch.arange(30) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        cache = lkv.Cache(any_model, POLICY, retention=retention, chunks=chunks)
        first, shown = call(any_model, ids, mask, cache), mask
        outputs = []
        for i in range(6):
            shown = torch.cat([shown, torch.ones(3, 1).long()], 1)
            outputs.append(call(any_model, then[:, i : i + 1], shown, cache))
        for b, length in enumerate(lengths):
            alone = lkv.Cache(any_model, POLICY, retention=retention, chunks=chunks)
            own = call(any_model, ids[b : b + 1, :length], None, alone)
            torch.testing.assert_close(first[b : b + 1, :length], own, rtol=1e-4, atol=1e-4)
            for i in range(6):
                own = call(any_model, then[b : b + 1, i : i + 1], None, alone)
                torch.testing.assert_close(outputs[i][b : b + 1], own, rtol=1e-4, atol=1e-4)
            for one, other in zip(cache.ragged, alone.ragged, strict=True):
                assert (
                    one.row_counts[b] == other.row_counts[0]
                    and one.rows.lengths[b].tolist() == other.rows.lengths[0].tolist()
                )


def test_what_a_mask_hides_where_padding_moved_tokens(model):
    """Columns of the mask and positions of the rows differ behind a call with gaps."""
    mask = torch.tensor([[1] * 12, [1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0]])
    ids, later = tokens(2, 12), torch.cat([mask, torch.ones(2, 3).long()], 1)
    later[1, [3, 9]] = 0
    with torch.no_grad():
        cache, dense = lkv.Cache(model, POLICY, retention=1.0), DynamicCache(config=model.config)
        for each in (cache, dense):
            call(model, ids, mask, each)
        outputs = [call(model, tokens(2, 3, seed=1), later, each) for each in (cache, dense)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        some = copy.deepcopy(cache)
        some.batch_select_indices(torch.tensor([1, 1]))
        last = torch.cat([later, torch.ones(2, 2).long()], 1)[[1, 1]]
        last[1, 10] = 0
        dense.batch_select_indices(torch.tensor([1, 1]))
        outputs = [call(model, tokens(2, 2, seed=2), last, each) for each in (some, dense)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_sequences_of_which_nothing_is_hidden_need_no_mask(model):
    """Once those with padding are gone."""
    prompt = turn([30, 22], 0)
    with torch.no_grad():
        cache = lkv.Cache(model, POLICY, retention=0.5)
        call(model, prompt.ids, prompt.mask, cache)
        cache.batch_select_indices(torch.tensor([0]))
        assert call(model, tokens(1, 3), None, cache).shape == (1, 3, 64)


def test_reading():
    """Masks of new tokens among themselves, as models make them where rows are packed."""
    causal = torch.ones(1, 1, 4, 4).bool().tril()
    blocks = causal.clone()
    blocks[..., 1, 2] = True  # like two tokens of one picture
    assert masks.is_causal(causal, 2, 4) and not masks.is_causal(blocks, 2, 4)
    assert not masks.is_causal(causal.roll(1, 2), 2, 4)
    assert masks.is_causal(causal[:, :, 2:], 2, 4) and not masks.is_causal(causal[:, :, 2:].roll(1, 3), 2, 4)
    padded = causal.expand(2, -1, -1, -1).clone()
    padded[1, :, :, 0] = False
    assert masks.is_causal(padded, 2, 4)
    of_heads = causal.repeat(1, 2, 1, 1)
    of_heads[:, 0, :, 0] = of_heads[:, 1, :, 1] = False  # every token is seen by some head
    read = masks.read(of_heads, None, None, 2, 0, 4)
    assert read.hidden is None and not read.causal
    for lowest, same in ((-torch.inf, True), (LOWEST, True), (torch.finfo(torch.bfloat16).min, True), (-9.0, False)):
        additive = torch.zeros(1, 1, 4, 4).masked_fill(~causal, LOWEST)
        additive[..., 0, 2] = lowest
        assert masks.is_causal(additive, 2, 4) == same
    known = torch.tensor([[False] * 3, [True, False, False]])
    read = masks.read({"full_attention": padded, "sliding_attention": None}, None, known, 2, 3, 4)
    assert read.causal and read.hidden.tolist() == [[False] * 7, [True, False, False, True, False, False, False]]
    assert masks.read(blocks, None, known, 2, 3, 4).causal is False
    outer = torch.tensor([[1] * 7, [0, 0, 1, 0, 1, 1, 1]])
    assert masks.read(padded, outer, known, 2, 3, 4).hidden.tolist() == (outer == 0).tolist()


@pytest.mark.parametrize("count", [2, 4])
def test_a_block_of_a_model_on_packed_rows(model, count, monkeypatch):
    """A mask that the model made, and that is not causal: refused where rows are packed, as it was before."""
    functions = __import__("transformers").masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    block = torch.ones(2, 1, count, count).bool()
    cache = lkv.Cache(model, POLICY, retention=0.5)
    with torch.no_grad():
        call(model, tokens(2, 20), None, cache)
        monkeypatch.setitem(functions._global_mapping, "lkv_sdpa", lambda *args, **kwargs: block)
        with pytest.raises(ValueError, match="lkv.Cache: expected a causal mask"):
            call(model, tokens(2, count), None, cache)
    assert cache.get_seq_length() == 20
