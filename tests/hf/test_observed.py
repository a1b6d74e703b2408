"""Hidden states and keys before RoPE that policies are shown, against what the modules of the model made of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from conversation import talk, turn
from families import FAMILIES, SMALL, build, call, selected, tokens
from torch import Tensor
from transformers import PreTrainedModel

import lkv
from lkv.policies import Observation, SnapKV, StreamingLLM

NEEDS = frozenset({"hidden_states", "pre_rope_keys", "queries"})
SHAPES = {"one": ([47], [21]), "padded": ([47, 31, 9, 40], [21, 2, 17, 20])}


class Spy(SnapKV):
    """Keeps the observations of every layer; its scores come from what it observes."""

    needs = NEEDS
    seen: dict[int, list[Observation]]

    def score(self, layer, observation):
        self.seen.setdefault(layer, []).append(observation)
        by_token = observation.hidden_states.float().norm(dim=-1)
        batch, heads, _ = observation.positions.shape
        index = observation.positions.long().clamp(0, by_token.shape[1] - 1)
        scores = by_token[:, None].expand(batch, heads, -1).gather(2, index) + observation.pre_rope_keys[..., 0].float()
        return scores.masked_fill(~observation.valid(), 0.0)


def spy() -> Spy:
    policy = Spy(window=4)
    object.__setattr__(policy, "seen", {})
    return policy


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]]:
    """Per layer and call, keys `[B, H, n, D]` as their projection (and norm) made them, and what came into it."""
    keys, hidden, handles = {}, {}, []

    def note(index: int, first: int, dim: int, transposed: bool = False):
        """A hook on the projection or the norm of keys, whose heads begin at `first` of its output."""

        def hook(module, args, out):
            out = out.unflatten(-1, (-1, dim))[:, :, first : first + 2] if out.dim() == 3 else out
            keys.setdefault(index, []).append(out if transposed else out.transpose(1, 2))

        return hook

    def inputs(index: int):
        return lambda module, args: hidden.setdefault(index, []).append(args[0])

    for index, layer in enumerate(model.get_decoder().layers):
        attention = layer.self_attn
        packed = hasattr(attention, "qkv_proj")
        projection = attention.qkv_proj if packed else attention.k_proj
        transposed = model.config.model_type.startswith("gemma3")  # its norm comes behind the transposition
        handles.append(projection.register_forward_pre_hook(inputs(index)))
        made = note(index, 4 if packed else 0, attention.head_dim, transposed)
        handles.append(getattr(attention, "k_norm", projection).register_forward_hook(made))
    try:
        yield keys, hidden
    finally:
        for handle in handles:
            handle.remove()


def compare(observed: Observation, keys: list[Tensor], hidden: list[Tensor], **tolerance: float) -> None:
    """All valid rows."""
    keys, hidden = torch.cat(keys, 2), torch.cat(hidden, 1)
    count = observed.hidden_states.shape[1]
    assert torch.equal(observed.hidden_states, hidden[:, :count])
    index = observed.positions.long().clamp(0, count - 1)
    expected = keys.gather(2, index[..., None].expand(-1, -1, -1, keys.shape[-1]))
    valid = observed.valid()
    assert valid.any() and observed.pre_rope_keys.dtype == observed.keys.dtype
    torch.testing.assert_close(observed.pre_rope_keys[valid], expected[valid], **tolerance)
    moved = (observed.pre_rope_keys - observed.keys)[valid].abs().amax(-1)
    assert (moved > 0.01).float().mean() > 0.5  # RoPE is there


def check(model: PreTrainedModel, shape: str, chunks: str = "each", chunk: int | None = None, cap: int | None = None):
    policy = spy()
    turns = [turn(SHAPES[shape][0], 9), turn(SHAPES[shape][1], 9, seed=1)]
    options = dict(retention=0.3, chunks=chunks, cap=cap, interval=3)
    with watched(model) as (keys, hidden), lkv.Cache(model, policy, **options) as cache:
        talk(model, cache, turns, chunk)
    assert len(policy.seen) == len(cache.ragged)
    for rank, observations in policy.seen.items():
        assert len(observations) >= 2
        index = cache.ragged[rank].index
        for observed in observations:
            compare(observed, keys[index], hidden[index], rtol=1e-4, atol=1e-5)
    return policy, cache


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", selected(FAMILIES))
def test_prompt_and_second_turn(family, shape):
    policy, cache = check(build(family), shape)
    assert all(len(observations) == 2 for observations in policy.seen.values())
    assert len({id(layer.observations.rotary) for layer in cache.ragged}) == 1


@pytest.mark.parametrize("options", [dict(chunks="last", chunk=13), dict(chunk=13), dict(cap=16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_and_cap(shape, options):
    check(build("llama"), shape, **options)


def test_half_precision():
    model = copy.deepcopy(build("llama")).to(torch.bfloat16)
    policy = spy()
    with torch.no_grad(), watched(model) as (keys, hidden), lkv.Cache(model, policy, retention=0.3) as cache:
        call(model, tokens(2, 40), None, cache)
    for layer, (observed,) in policy.seen.items():
        compare(observed, keys[layer], hidden[layer], rtol=2e-2, atol=2e-2)


def test_hooks_are_added_once():
    """And only where something is observed that needs them; they go along with a copy of the model."""
    model = copy.deepcopy(build("qwen3"))
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        module._forward_hooks_always_called.clear()

    def hooks(whole: PreTrainedModel) -> list[int]:
        modules = [whole, whole.model, *(layer.self_attn for layer in whole.model.layers)]
        return [len(module._forward_pre_hooks) for module in modules]

    plain = lkv.Cache(model, retention=0.5)
    assert hooks(model) == [1, 1, 0, 0]
    observing = [lkv.Cache(model, "streaming_llm", retention=0.5, observe={"hidden_states"}) for _ in range(2)]
    twin = copy.deepcopy(model)
    lkv.Cache(twin, "streaming_llm", retention=0.5, observe={"hidden_states"})
    assert hooks(model) == hooks(twin) == [1, 1, 1, 1]
    with torch.no_grad():
        for cache in (plain, *observing):
            call(model, tokens(1, 20), None, cache)
        model(tokens(1, 20))
    assert (
        observing[0].ragged[0].observations.hidden_states.length == 20
        and plain.ragged[0].observations.hidden_states is None
    )


def test_what_is_observed_follows_the_cache():
    """Beams, selection, cropping, copies, resetting: later observations are as those of a cache without all that."""
    model, policy = build("qwen2"), StreamingLLM()
    first, second = turn([30, 17, 25], 0), tokens(3, 6, seed=1)
    options = dict(retention=1.0, chunks="last", observe=NEEDS, observe_window=4)

    def shown(cache: lkv.Cache) -> list[Observation]:
        mine = spy()
        cache.evict(mine, retention=0.2)
        return [each for seen in mine.seen.values() for each in seen]

    def same(a: lkv.Cache, b: lkv.Cache) -> None:
        for one, other in zip(shown(a), shown(b), strict=True):
            valid = one.valid()
            assert torch.equal(one.hidden_states, other.hidden_states)
            torch.testing.assert_close(one.pre_rope_keys[valid], other.pre_rope_keys[valid])

    def started(order: list[int]) -> lkv.Cache:
        cache = lkv.Cache(model, policy, **options)
        with torch.no_grad():
            call(model, first.ids[order], first.mask[order], cache)
            mask = torch.cat([first.mask, torch.ones(3, 6).long()], 1)
            call(model, second[order], mask[order], cache)
        return cache

    for order in ([2, 0], [1, 1, 0, 2]):
        cache = started([0, 1, 2])
        cache.batch_select_indices(torch.tensor(order))
        same(cache, started(order))
    cache = started([0, 1, 2])
    twin = cache.fork()
    with torch.no_grad():
        call(model, tokens(3, 4), torch.cat([first.mask, torch.ones(3, 10).long()], 1), twin)
    twin.crop(-4)
    same(twin, cache.fork())
    twin.reset()
    with torch.no_grad():
        call(model, tokens(2, 20), None, twin)
    assert shown(twin)[0].hidden_states.shape == (2, 20, 32)
    same(copy.deepcopy(cache), cache)
    single = lkv.Cache(model, policy, **options)
    with torch.no_grad():
        call(model, tokens(1, 20), None, single)
    single.batch_repeat_interleave(3)
    three = lkv.Cache(model, policy, **options)
    with torch.no_grad():
        call(model, tokens(1, 20).expand(3, -1), None, three)
    unpadded = lkv.Cache(model, policy, **options)  # of which all sequences have the same rotations
    with torch.no_grad():
        call(model, tokens(3, 20), None, unpadded)
    unpadded.batch_select_indices(torch.tensor([2, 0]))
    of_two = lkv.Cache(model, policy, **options)
    with torch.no_grad():
        call(model, tokens(3, 20)[[2, 0]], None, of_two)
    same(unpadded, of_two)
    one, other = shown(single), shown(three)
    assert [each.hidden_states.shape for each in one] == [each.hidden_states.shape for each in other]
    assert [each.pre_rope_keys.shape for each in one] == [each.pre_rope_keys.shape for each in other]


def test_a_call_that_fails_is_not_observed():
    model, policy = build("llama"), StreamingLLM()
    options = dict(retention=1.0, chunks="last", observe=NEEDS, observe_window=4)
    with torch.no_grad(), lkv.Cache(model, policy, **options) as cache, watched(model) as (keys, hidden):
        call(model, tokens(2, 20), None, cache)

        def interrupt(*args: object) -> None:
            raise KeyError

        hook = model.model.layers[1].input_layernorm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyError):
            call(model, tokens(2, 7), None, cache)
        hook.remove()
        for values in (keys, hidden):
            values[0].pop()
        call(model, tokens(2, 5, seed=4), None, cache)
        mine = spy()
        cache.evict(mine, retention=0.3)
    for layer, (observed,) in mine.seen.items():
        compare(observed, keys[layer], hidden[layer], rtol=1e-4, atol=1e-5)


def test_a_compiled_model():
    model = copy.deepcopy(build("llama"))
    compiled = torch.compile(model, backend="eager")
    seen = []
    for each in (model, compiled):
        mine = spy()
        with torch.no_grad(), lkv.Cache(model, mine, budget=9) as cache:
            each(tokens(2, 30), use_cache=True, past_key_values=cache)
            each(tokens(2, 1), use_cache=True, past_key_values=cache)
            each(tokens(2, 4), use_cache=True, past_key_values=cache)
        seen.append([o for observations in mine.seen.values() for o in observations])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one.pre_rope_keys[one.valid()], other.pre_rope_keys[other.valid()])


def test_what_cannot_be_observed():
    """Models whose rotation is not known, and modules that are called behind the hooks' back."""
    config = transformers.GlmConfig(**{**SMALL, "head_dim": 8})
    glm = transformers.GlmForCausalLM(config)
    with pytest.raises(ValueError, match=r"lkv.Cache: expected one of .*, qwen3 where keys before RoPE .*, got glm"):
        lkv.Cache(glm, retention=0.5, observe={"pre_rope_keys"})
    model = build("llama")
    with torch.no_grad(), lkv.Cache(model, spy(), retention=0.5) as cache:
        for layer in model.model.layers:
            layer.self_attn._forward_pre_hooks.clear()
        with pytest.raises(ValueError, match="lkv.Cache: expected LlamaAttention 0 to be called with hooks"):
            call(model, tokens(1, 20), None, cache)
        assert cache.get_seq_length() == 0
