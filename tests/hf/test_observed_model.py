"""What policies are shown of the model beside rows: all queries, rotations, projections, and what attention changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from families import build, call, tokens
from torch import Tensor
from transformers import PreTrainedModel

import lkv
from lkv.hf.capture import cosines
from lkv.hf.observation import observe
from lkv.policies import H2O, AdaKV, ExpectedAttention, SnapKV, SqueezeAttention, StreamingLLM

NEEDS = frozenset({"all_queries", "rotary", "output_projection", "attention_cosine", "pre_rope_keys"})
FAMILIES = ["llama", "qwen3", "phi3"]
MASKS = {"none": None, "in front": [[0, 30], [9, 30]], "between": [[4, 30], [0, 21]]}


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[dict[str, dict[int, list[Tensor]]]]:
    """Per layer and call: what came into the layer, what attention gave, and queries before RoPE `[B, Hq, n, D]`."""
    seen: dict[str, dict[int, list[Tensor]]] = {"in": {}, "added": {}, "queries": {}}
    handles = []
    for index, layer in enumerate(model.get_decoder().layers):
        attention, dim = layer.self_attn, layer.self_attn.head_dim

        def note_queries(module, args, out, dim: int = dim, index: int = index):
            out = out if out.dim() == 4 else out.unflatten(-1, (-1, dim))
            seen["queries"].setdefault(index, []).append(out[:, :, : model.config.num_attention_heads].transpose(1, 2))

        def note_added(module, args, out, index: int = index):
            seen["added"].setdefault(index, []).append(out[0])

        def note_in(module, args, index: int = index):
            seen["in"].setdefault(index, []).append(args[0])

        projection = getattr(attention, "qkv_proj", None) or attention.q_proj
        handles += [
            layer.register_forward_pre_hook(note_in),
            attention.register_forward_hook(note_added),
            getattr(attention, "q_norm", projection).register_forward_hook(note_queries),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def mask_of(spans: list[list[int]] | None) -> Tensor | None:
    if spans is None:
        return None
    mask = torch.zeros(2, 30, dtype=torch.long)
    for b, (first, end) in enumerate(spans):
        mask[b, first:end] = 1
    return mask


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_observed(family: str, mask: str) -> None:
    """Of a prompt in two pieces, and a batch with padding on either side."""
    model, visible = build(family), mask_of(MASKS[mask])
    cache = lkv.Cache(model, StreamingLLM(), retention=1.0, chunks="last", observe=NEEDS)
    ids, pieces = tokens(2, 30), ((0, 13), (13, 30))
    with watched(model) as seen:
        for first, end in pieces:
            call(model, ids[:, first:end], None if visible is None else visible[:, :end], cache)
    there = torch.ones(2, 30, dtype=torch.bool) if visible is None else visible.bool()
    for index, layer in enumerate(cache.ragged):
        o = observe(layer, NEEDS, 1)
        before, added = (torch.cat(seen[kind][index], 1) for kind in ("in", "added"))
        cosine = torch.nn.functional.cosine_similarity(before, before + added, dim=-1)
        torch.testing.assert_close(o.attention_cosine, (cosine * there).sum(1) / there.sum(1))
        assert o.output_projection is model.get_decoder().layers[index].self_attn.o_proj.weight
        queries = torch.cat(seen["queries"][index], 2)
        undone = o.rotary.undo(o.queries, o.query_positions)
        for b in range(2):
            torch.testing.assert_close(undone[b][:, o.query_mask[b]], queries[b][:, there[b]], rtol=1e-4, atol=1e-5)
            rows = o.positions[b, 0][o.valid()[b, 0]]
            assert o.query_positions[b][o.query_mask[b]].tolist() == rows.tolist()  # a query for each row
        cos, sin = o.rotary.next(7)
        for b in range(2):
            place = int(there[b].sum()) + torch.arange(7)
            expected = model.get_decoder().rotary_emb(torch.empty(0), place[None])
            torch.testing.assert_close(torch.stack([cos[b], sin[b]]), torch.stack([x[0] for x in expected]))


@torch.no_grad()
def test_queries_are_forgotten_with_the_rows() -> None:
    """What they have paid stays with the rows; what is generated without a cap is not stored."""
    model = build("llama")
    cache = lkv.Cache(model, H2O(), retention=0.5)
    call(model, tokens(1, 20), None, cache)
    assert cache.ragged[0].observations.all_queries.empty
    call(model, tokens(1, 1, 1), None, cache)
    with pytest.raises(ValueError, match="expected queries of tokens since the last eviction, got none"):
        cache.evict(retention=0.1)
    call(model, tokens(1, 6, 2), None, cache)  # which is a prompt, and evicts
    assert cache.ragged[0].observations.all_queries.empty
    waiting = lkv.Cache(model, H2O(), retention=0.5, chunks="last")
    call(model, tokens(1, 20), None, waiting)
    waiting.crop(-5)
    assert observe(waiting.ragged[0], waiting.settings.observe, 1).queries.shape[2] == 15
    waiting.batch_select_indices(torch.tensor([0, 0]))
    o = observe(waiting.ragged[0], waiting.settings.observe, 1)
    assert o.queries.shape[0] == o.query_mask.shape[0] == 2 and torch.equal(o.queries[0], o.queries[1])


@pytest.mark.parametrize("parts", [[20], [12, 20]], ids=str)
@torch.no_grad()
def test_queries_of_hidden_tokens_do_not_count(parts: list[int]) -> None:
    """Of the sequence that hides them, whether they are in one part or in several."""
    model, ids, mask = build("llama"), tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    cache = lkv.Cache(model, H2O(), retention=0.5, chunks="last")
    with cache.prefill():
        for begin, end in pairwise([0, *parts]):
            call(model, ids[:, begin:end], mask[:, :end], cache)
        mask[0, 10:14] = 0
        call(model, ids[:, 20:], mask, cache)
        for layer in cache.ragged:
            _, places, filled = layer.observations.all_queries.read()
            assert places.tolist() == 2 * [list(range(24))] and torch.equal(filled, mask.bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosines_are_of_float32(dtype: torch.dtype) -> None:
    before, added = torch.randn(2, 2, 9, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = cosines(before, added, None)
    whole = torch.nn.functional.cosine_similarity(before.double(), (before + added).double(), dim=-1)
    assert found.dtype == torch.float32 and found.shape == (2, 9, 1)
    torch.testing.assert_close(found[..., 0].double(), whole, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_cosines_go_with_their_tokens(tmp_path) -> None:
    """Cropped ones, those that a mask hides later, sequences that are chosen, and what is in a file."""
    model, ids = build("llama"), tokens(2, 30)

    def cosine(cache: lkv.Cache) -> Tensor:
        return torch.stack([observe(x, cache.settings.observe, 1).attention_cosine for x in cache.ragged])

    def read(count: int) -> lkv.Cache:
        cache = lkv.Cache(model, SqueezeAttention(), retention=0.5, chunks="last")
        call(model, ids[:, :count], None, cache)
        return cache

    cache, few = read(24), cosine(read(19))
    cache.crop(-5)
    torch.testing.assert_close(cosine(cache), few)
    cache.save(tmp_path / "cache")
    torch.testing.assert_close(cosine(lkv.Cache.load(tmp_path / "cache", model)), few)
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(cosine(cache), few[:, 1:])

    hiding, mask = read(20), torch.ones(2, 24, dtype=torch.long)
    each = torch.cat([x.observations.cosines.read() for x in hiding.ragged], 2)
    mask[0, 5:9] = 0
    call(model, ids[:, 20:24], mask, hiding)
    later = torch.cat([x.observations.cosines.read()[:, 20:] for x in hiding.ragged], 2)
    shown = torch.cat([each, later], 1)[0, mask[0].bool()]
    torch.testing.assert_close(cosine(hiding)[:, 0], shown.mean(0))


@torch.no_grad()
def test_hidden_tokens_ask_nothing() -> None:
    """A mask that hides tokens later takes their queries back, too."""
    model, ids = build("llama"), tokens(1, 24)
    cache = lkv.Cache(model, H2O(), retention=0.5, chunks="last")
    call(model, ids[:, :20], None, cache)
    mask = torch.ones(1, 24, dtype=torch.long)
    mask[0, 5:9] = 0
    call(model, ids[:, 20:], mask, cache)
    o = observe(cache.ragged[0], cache.settings.observe, 1)
    assert o.query_mask[0].tolist() == mask[0].bool().tolist()


def test_models_that_are_refused() -> None:
    """Where what is added to the residual stream is not what attention gives, and where nothing is rotated so."""
    for policy, need in ((SqueezeAttention(), "attention_cosine"), (ExpectedAttention(), "rotary")):
        with pytest.raises(ValueError, match=f"expected one of llama, .* for {need}, got gemma2"):
            lkv.Cache(build("gemma2"), policy, retention=0.5)
    assert lkv.Cache(build("gemma2"), AdaKV(SnapKV(window=4)), retention=0.5)
