"""What is a prompt, where it ends, and what can follow it."""

from __future__ import annotations

import warnings

import pytest
import torch
from conversation import turn
from families import FAMILIES, build, call, selected, tokens
from torch import Tensor
from transformers import PreTrainedModel

import lkv
from lkv.hf import planning
from lkv.hf.versions import RecurrentLayer
from lkv.policies import AdaKV, SnapKV, StreamingLLM

POLICIES = pytest.mark.parametrize("policy", [SnapKV(window=4), AdaKV(SnapKV(window=4)), StreamingLLM()], ids=str)
GREEDY = dict(do_sample=False, max_new_tokens=10, eos_token_id=99)  # which no token is: drafts need one


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


def positions(cache: lkv.Cache) -> list[list[int]]:
    """The positions of the rows of every head."""
    kept = []
    for layer in cache.ragged:
        padded = layer.rows.padded(layer.rows.positions).flatten(0, 1)
        kept += [row[:n].tolist() for row, n in zip(padded, layer.rows.lengths.flatten().tolist(), strict=True)]
    return kept


@pytest.mark.parametrize("length", [40, 41, 42, 48, 49])
@POLICIES
def test_chunks_of_generate(model, policy, length):
    """Whatever the last chunk's size, the tokens and rows are those of the prompt in one piece."""
    if RecurrentLayer is None:
        pytest.skip("4.56 feeds the last chunk as if it were generated, 5.2 gives other tokens in chunks, to any cache")
    ids = tokens(1, length)
    whole, parts = (lkv.Cache(model, policy, retention=0.3, chunks="last") for _ in range(2))
    outputs = model.generate(ids, past_key_values=whole, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=parts, prefill_chunk_size=8, **GREEDY), outputs)
    assert positions(parts) == positions(whole)


@pytest.mark.parametrize("sizes", [[20, 20], [39, 1], [8] * 5, [1] * 40, [13, 1, 1, 25]], ids=str)
@POLICIES
def test_last_is_behind_the_token_that_follows(model, policy, sizes):
    """It sees the whole prompt, and is chosen among; with `prefill` the rows are those of the prompt alone."""
    ids, token = tokens(1, 40), tokens(1, 1, seed=3)
    with torch.no_grad():
        dense = call(model, torch.cat([ids, token], 1), None, None)[:, -1:]
        pieces = lkv.Cache(model, policy, retention=0.3, chunks="last")
        with pieces.prefill():
            for piece in ids.split(sizes, 1):
                call(model, piece, None, pieces)
                assert all(layer.rows is None for layer in pieces.ragged)
        whole = lkv.Cache(model, policy, retention=0.3)
        call(model, ids, None, whole)
        assert positions(pieces) == positions(whole) and {len(rows) for rows in positions(pieces)} <= {*range(30)}
        torch.testing.assert_close(
            call(model, token, None, pieces), call(model, token, None, whole), rtol=1e-4, atol=1e-4
        )
        if 1 not in sizes:
            plain = lkv.Cache(model, policy, retention=0.3, chunks="last")
            for piece in ids.split(sizes, 1):
                call(model, piece, None, plain)
            torch.testing.assert_close(call(model, token, None, plain), dense, rtol=1e-4, atol=1e-4)
            assert sum(map(len, positions(plain))) == len(positions(plain)) * round(0.3 * 41)


@POLICIES
def test_a_prompt_token_by_token(policy):
    """Each token is evicted behind, as each piece of a prompt is; within `prefill` as outside of it."""
    model, ids = build("llama"), tokens(1, 60)
    within, without = (lkv.Cache(model, policy, retention=0.15) for _ in range(2))
    with torch.no_grad():
        for i in range(60):
            call(model, ids[:, i : i + 1], None, without)
        with within.prefill():
            for i in range(60):
                call(model, ids[:, i : i + 1], None, within)
    assert positions(within) == positions(without) and within.ragged[0].row_counts == [2 * 9]


def test_last_token_by_token_warns():
    model, ids = build("llama"), tokens(1, 30)
    cache = lkv.Cache(model, "streaming_llm", retention=0.15, chunks="last")
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match=r"comes token by token has no end that chunks='last' could see"),
    ):
        for i in range(30):
            call(model, ids[:, i : i + 1], None, cache)
            assert cache.ragged[0].row_counts == [2 * max(1, round(0.15 * (i + 1)))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.reset()
        with cache.prefill():
            for i in range(30):
                call(model, ids[:, i : i + 1], None, cache)
    assert cache.ragged[0].row_counts == [2 * 4]


def test_generated_tokens_are_no_prompt(model):
    """Also from a first token alone."""
    for count in (1, 2):
        cache = lkv.Cache(model, "streaming_llm", retention=0.15)
        outputs = model.generate(tokens(1, count), past_key_values=cache, max_new_tokens=30, do_sample=False)
        assert outputs.shape[1] == count + 30 and cache.ragged[0].row_counts[0] >= 2 * 29


def test_prefill_within_prefill():
    model, ids = build("llama"), tokens(1, 40)
    cache = lkv.Cache(model, "streaming_llm", retention=0.3, chunks="last")
    with torch.no_grad(), cache.prefill():
        with cache.prefill():
            call(model, ids[:, :20], None, cache)
        assert cache.ragged[0].rows is None
        call(model, ids[:, 20:], None, cache)
    assert cache.ragged[0].row_counts == [2 * 12]


def test_prefill_ends_where_it_fails():
    model, ids = build("llama"), tokens(1, 40)
    cache = lkv.Cache(model, "streaming_llm", retention=0.3, chunks="last")
    with torch.no_grad():
        with pytest.raises(KeyError), cache.prefill():
            call(model, ids, None, cache)
            raise KeyError
        assert cache.ragged[0].rows is None
        call(model, tokens(1, 1), None, cache)
    assert cache.ragged[0].row_counts == [2 * 12]


@pytest.mark.parametrize("chunks", ["each", "last"])
def test_the_next_question_on_the_same_document(model, chunks):
    """What lies outside of `prefill` is no prompt: it is appended, and cropped again."""
    document, questions = tokens(1, 40), [tokens(1, n, seed=n) for n in (5, 1, 9)]
    if model is build("gemma3"):
        pytest.skip("its sliding windows cannot go back")
    cache = lkv.Cache(model, "snapkv", retention=0.2, chunks=chunks)
    with torch.no_grad(), cache.prefill():
        call(model, document[:, :20], None, cache)
        call(model, document[:, 20:], None, cache)
    end, kept = cache.get_seq_length(), positions(cache)
    for question in questions:
        fork, ids = cache.fork(), torch.cat([document, question], 1)
        outputs = model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.ragged[0].row_counts == [sum(map(len, kept[:2])) + 2 * (question.shape[1] + 9)]
        assert torch.equal(model.generate(ids, past_key_values=fork, **GREEDY), outputs)
        cache.crop(end)
        assert positions(cache) == kept and cache.get_seq_length() == end


@pytest.mark.parametrize("chunks", ["each", "last"])
def test_crop_where_nothing_was_evicted(model, chunks):
    if model is build("gemma3"):
        pytest.skip("its sliding windows cannot go back")
    ids, more = tokens(2, 40), tokens(2, 6, seed=1)
    with torch.no_grad():
        cache = lkv.Cache(model, "adakv", retention=1.0, chunks=chunks)
        call(model, ids, None, cache)
        call(model, more[:, :1], None, cache)
        cache.crop(-11)
        assert cache.get_seq_length() == 30
        dense = call(model, torch.cat([ids[:, :30], more], 1), None, None)[:, 30:]
        torch.testing.assert_close(call(model, more, None, cache), dense, rtol=1e-4, atol=1e-4)
        cache.crop(3)
        dense = call(model, torch.cat([ids[:, :3], more], 1), None, None)[:, 3:]
        torch.testing.assert_close(call(model, more, None, cache), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[14], [9, 14]], ids=["one", "padded"])
@pytest.mark.parametrize("argument", [-3, 11], ids=["what to drop", "what to keep"])
@pytest.mark.parametrize("family", selected(FAMILIES))
def test_crop_within_windows(family: str, argument: int, lengths: list[int]) -> None:
    """14 tokens fit in every window, so that all layers go back; then the next tokens are as if nothing had been."""
    model, text, more = build(family), turn(lengths, 0), tokens(len(lengths), 2, seed=1)
    behind = torch.cat([text.mask[:, :11], torch.ones_like(more)], 1)
    with torch.no_grad():
        cache = lkv.Cache(model, "snapkv", retention=1.0)
        call(model, text.ids, text.mask, cache)
        cache.crop(argument)
        assert {layer.get_seq_length() for layer in cache.layers} == {11}
        dense = call(model, torch.cat([text.ids[:, :11], more], 1), behind, None)[:, 11:]
        torch.testing.assert_close(call(model, more, behind, cache), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("argument", [-1, 19])
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_windows_that_have_moved_on_cannot_go_back(family: str, argument: int) -> None:
    model, ids = build(family), tokens(1, 22)
    with torch.no_grad():
        cache = lkv.Cache(model, "snapkv", retention=1.0)
        call(model, ids[:, :20], None, cache)
        with pytest.raises(ValueError, match=r"lkv.Cache.crop: expected layers that can go back"):
            cache.crop(argument)
        dense = call(model, ids, None, None)[:, 20:]
        torch.testing.assert_close(call(model, ids[:, 20:], None, cache), dense, rtol=1e-4, atol=1e-4)


def evicted(model: PreTrainedModel, ids: Tensor, chunks: str) -> lkv.Cache:
    cache = lkv.Cache(model, "snapkv", retention=0.3, chunks=chunks)
    with torch.no_grad(), cache.prefill():
        call(model, ids, None, cache)
    return cache


DRAFTS = {"lookup": lambda: dict(prompt_lookup_num_tokens=3), "model": lambda: dict(assistant_model=build("qwen2"))}


@pytest.mark.parametrize("chunks", ["each", "last"])
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("policy", ["snapkv", "adakv", "h2o", "expected_attention"])
def test_a_prompt_that_comes_with_a_draft(
    policy: str, drafts: str, chunks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every turn it is evicted once the draft is verified, and all of its queries count."""
    model, asked, plan = build("llama"), tokens(1, 8).repeat(1, 5), planning.plan
    cache = lkv.Cache(model, policy, retention=0.3, chunks=chunks)
    seen = []

    def watched(layers: list, *rest: object) -> list:
        queries = layers[0].observations.all_queries
        seen.append((layers[0].row_counts[0], None if queries is None else queries.read().queries.shape[2]))
        return plan(layers, *rest)

    monkeypatch.setattr(planning, "plan", watched)
    kept = 0
    for evictions in (1, 2):
        new = asked.shape[1] - cache.get_seq_length()
        mask = torch.ones_like(asked)  # of the token that pads as well
        outputs = model.generate(asked, attention_mask=mask, past_key_values=cache, **DRAFTS[drafts](), **GREEDY)
        rows, queries = seen[-1]
        accepted = (rows - kept) // 2 - new
        assert len(seen) == evictions == cache.ragged[0].evictions and 0 <= accepted < GREEDY["max_new_tokens"]
        assert queries in (None, new + accepted)
        kept = cache.ragged[0].row_counts[0]
        asked = torch.cat([outputs, tokens(1, 20, seed=evictions)], 1)


@pytest.mark.parametrize("chunks", ["each", "last"])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_drafts(drafts, chunks):
    """Prompt lookup and a draft model: the tokens of greedy decoding from the same evicted cache, and its rows."""
    model = build("llama")
    ids = tokens(1, 8).repeat(1, 5)
    cache = evicted(model, ids[:, :-1], chunks)
    options = DRAFTS[drafts]()
    plain, drafted = cache.fork(), cache.fork()
    outputs = model.generate(ids, past_key_values=plain, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=drafted, **options, **GREEDY), outputs)
    drafted.crop(min(drafted.get_seq_length(), plain.get_seq_length()))
    plain.crop(drafted.get_seq_length())
    assert positions(drafted) == positions(plain)
    if RecurrentLayer is not None:  # crops once the first drafts are verified, which tells that the prompt is over
        fresh = lkv.Cache(model, "snapkv", retention=0.3, chunks=chunks)
        model.generate(ids, past_key_values=fresh, **options, **GREEDY)
        assert fresh.ragged[0].evictions == 1 and fresh.ragged[0].row_counts[0] < 2 * 26
