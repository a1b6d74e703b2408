"""What a cache holds, all of it: after reset, of a copy, behind a call that failed, and however long it goes on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps

import pytest
import torch
from conversation import turn
from families import build, call, tokens
from snapshots import differences, snapshot
from torch import Tensor, nn
from transformers import PreTrainedModel

import lkv
from lkv.hf.layer import RaggedLayer
from lkv.policies import AdaKV, SnapKV

ALL = {"queries", "hidden_states", "pre_rope_keys"}
OPTIONS = dict(policy=AdaKV(SnapKV(window=4)), retention=0.4, observe=ALL, reserve=4)
PROMPT, LENGTHS = turn([20, 13, 17], 0), [20, 13, 17]


@pytest.fixture(params=["llama", "nondefault"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


class Past:
    """A cache and the mask of its tokens: calls go on with the mask of all tokens so far."""

    def __init__(self, model: PreTrainedModel, **options: object) -> None:
        self.model, self.cache = model, lkv.Cache(model, **{**OPTIONS, **options})
        self.mask = torch.zeros(3, 0, dtype=torch.long)

    def feed(self, count: int, seed: int = 0, new: Tensor | None = None, cache: lkv.Cache | None = None) -> Tensor:
        new = torch.ones(3, count, dtype=torch.long) if new is None else new
        self.mask = torch.cat([self.mask, new], 1)
        with torch.no_grad():
            return call(self.model, tokens(3, count, seed) * new, self.mask, cache or self.cache)


class Stop(Exception):
    pass


@contextmanager
def stopping(module: nn.Module, behind: bool = False) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stop

    hook = module.register_forward_hook(stop) if behind else module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def once(make: Callable[[PreTrainedModel], Past]) -> Callable[[PreTrainedModel], Past]:
    """Copies of a past that is made once; `__wrapped__` makes another."""
    made = cache(make)

    @wraps(make)
    def again(model: PreTrainedModel) -> Past:
        past = copy.copy(made(model))
        past.cache, past.mask = copy.deepcopy(past.cache), past.mask.clone()
        return past

    return again


@once
def empty(model: PreTrainedModel) -> Past:
    return Past(model)


@once
def whole(model: PreTrainedModel) -> Past:
    past = Past(model, chunks="last")
    past.feed(20, new=PROMPT.mask)
    return past


@once
def packed(model: PreTrainedModel) -> Past:
    past = Past(model)
    past.feed(20, new=PROMPT.mask)
    past.feed(1, 1)
    return past


@once
def prefilled(model: PreTrainedModel) -> Past:
    """`prefill` was used, and what came behind it is no prompt."""
    past = Past(model)
    with past.cache.prefill():
        past.feed(20, new=PROMPT.mask)
    past.feed(2, 1)
    return past


@once
def hidden(model: PreTrainedModel) -> Past:
    """Some tokens were hidden later, and padding came between others."""
    past = packed(model)
    past.mask[1, 9:12] = 0
    past.feed(5, 2)
    past.feed(4, 3, new=torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]]))
    return past


@once
def capped(model: PreTrainedModel) -> Past:
    past = Past(model, retention=None, cap=12, interval=3)
    past.feed(20, new=PROMPT.mask)
    for i in range(4):
        past.feed(1, i)
    return past


@once
def token_by_token(model: PreTrainedModel) -> Past:
    past = Past(model)
    for i in range(8):
        past.feed(1, i)
    return past


@once
def failed(model: PreTrainedModel) -> Past:
    """Nothing has come to its end."""
    past = Past(model)
    with pytest.raises(Stop), stopping(model.get_decoder().layers[-1]):
        past.feed(20)
    past.mask = past.mask[:, :0]
    return past


@once
def cropped(model: PreTrainedModel) -> Past:
    past = Past(model, chunks="last")
    past.feed(12)
    past.cache.crop(-2)
    past.mask = past.mask[:, :10]
    return past


@once
def gapped(model: PreTrainedModel) -> Past:
    """Padding came between tokens of packed rows, and nothing was evicted since."""
    past = Past(model, chunks="last")
    past.feed(20, new=PROMPT.mask)
    past.feed(1, 1)
    past.feed(4, 2, new=torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]]))
    return past


@once
def two_rotations(model: PreTrainedModel) -> Past:
    """Layers that are given copies of the rotations, as on several devices."""
    past = Past(model)
    last = model.get_decoder().layers[past.cache.ragged[-1].index].self_attn

    def copied(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, ...]:
        return args, kwargs | {"position_embeddings": tuple(t.clone() for t in kwargs["position_embeddings"])}

    hook = last.register_forward_pre_hook(copied, with_kwargs=True, prepend=True)
    past.feed(20, new=PROMPT.mask)
    past.feed(1, 1)
    hook.remove()
    return past


STATES = [empty, whole, packed, prefilled, hidden, capped, token_by_token, failed, cropped, two_rotations]
PASTS = pytest.mark.parametrize("past", STATES, ids=lambda f: f.__name__)


@PASTS
def test_reset_is_a_new_cache(model, past):
    made = past(model)
    made.cache.reset()
    fresh = lkv.Cache(model, **{**OPTIONS})
    for part in (made.cache, *made.cache.ragged):
        part.settings = fresh.settings
    assert differences(snapshot(made.cache), snapshot(fresh)) == []


def by_pickle(cache: lkv.Cache) -> lkv.Cache:
    return pickle.loads(pickle.dumps(cache))


COPIES = {"fork": lkv.Cache.fork, "copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": by_pickle}


@pytest.mark.parametrize("way", [*COPIES, "file"])
@PASTS
def test_copies_hold_the_same(model, past, way, tmp_path):
    cache = past.__wrapped__(model).cache
    before = snapshot(cache)
    assert len(cache.history.rotations.all) == {empty: 0, failed: 0, two_rotations: 2}.get(past, 1)
    if way == "file":
        cache.save(tmp_path / "cache")
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]
        twin = lkv.Cache.load(tmp_path / "cache", model)
    else:
        twin = COPIES[way](cache)
    assert differences(snapshot(twin), before) == differences(snapshot(cache), before) == []
    assert twin.settings == cache.settings and twin.history is not cache.history
    shared = {id(part) for part in _parts(cache)} & {id(part) for part in _parts(twin)}
    assert not shared


def _parts(cache: lkv.Cache) -> Iterator[object]:
    """Everything that is written to in place."""
    yield from (cache.history, cache.history.rotations, cache.history.rotations.all, cache.layers, *cache.layers)
    for layer in cache.ragged:
        observations = layer.observations
        yield from (layer.token_counts, layer.row_counts, observations)
        yield from filter(None, (layer.rows, observations.queries, observations.hidden_states, observations.rotary))


def hide(past: Past, cache: lkv.Cache) -> None:
    past.mask[:, -1] = 0
    past.feed(2, 5, cache=cache)


DEEDS: dict[str, Callable[[Past, lkv.Cache], object]] = {
    "token": lambda past, cache: past.feed(1, 7, cache=cache),
    "tokens": lambda past, cache: past.feed(6, 7, cache=cache),
    "hide": hide,
    "evict": lambda past, cache: cache.evict(budget=5),
    "select": lambda past, cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "reorder": lambda past, cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
    "reset": lambda past, cache: cache.reset(),
    "close": lambda past, cache: cache.close(),
}


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("past", [whole, packed, hidden], ids=lambda f: f.__name__)
def test_what_becomes_of_a_fork_is_its_own(past, deed):
    """And of the cache that it was made of."""
    for way in (lkv.Cache.fork, copy.deepcopy):
        made = past(build("nondefault"))
        mask, twin = made.mask, way(made.cache)
        for acting, other in ((way(made.cache), made.cache), (made.cache, twin)):
            before, made.mask = snapshot(other), mask.clone()
            DEEDS[deed](made, acting)
            assert differences(snapshot(other), before) == []


# In a layer that is evicted: before its keys come, between keys and attention is nothing, and behind; and at the end.
PLACES = {
    "norm": (lambda layers: layers[1].input_layernorm, False),
    "keys": (lambda layers: layers[1].self_attn.k_proj, False),
    "out": (lambda layers: layers[1].self_attn.o_proj, False),
    "last": (lambda layers: layers[-1], True),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("new", ["token", "tokens", "padded"])
@PASTS
def test_a_model_that_fails(past, new, place):
    """Everything is as before, whatever part of the model failed."""
    model = build("nondefault")
    made = past(model)
    if past is not capped:
        made.cache.settings = Past(model, chunks="last").cache.settings  # or rows would be gone
    before, mask = snapshot(made.cache), made.mask
    find, behind = PLACES[place]
    present = torch.ones(3, 1 if new == "token" or past is capped else 5, dtype=torch.long)
    if new == "padded" and past not in (whole, cropped):  # whole rows would be packed
        present[0, :2] = present[2, :4] = 0
    with pytest.raises(Stop), stopping(find(model.get_decoder().layers), behind):
        made.feed(present.shape[1], new=present)
    made.mask = mask
    assert differences(snapshot(made.cache), before) == []


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_made_within_prefill_is_outside_of_it(way):
    """What follows there is no prompt, and evicts what was left; the prompt goes on here."""
    past = Past(build("llama"), chunks="last")
    with past.cache.prefill():
        past.feed(12)
        twin, mask = COPIES[way](past.cache), past.mask
        past.feed(1, 1, cache=twin)
        assert all(layer.evictions == 1 and not layer.due for layer in twin.ragged)
        past.mask = mask
        past.feed(8, 2)
        assert all(layer.rows is None for layer in past.cache.ragged)
    assert all(layer.row_counts == [2 * 8] * 3 and not layer.due for layer in past.cache.ragged)


def test_a_turn_that_fits_is_over():
    """Nothing of it was evicted, and nothing is later: what comes behind it is an answer."""
    past = Past(build("llama"), retention=None, budget=40)
    past.feed(20, new=PROMPT.mask)
    past.cache.evict(budget=12)  # rows are packed
    past.feed(9, 1)
    assert all(layer.evictions == 1 and not layer.due for layer in past.cache.ragged)
    for i in range(30):
        past.feed(1, i)
    assert all(layer.row_counts == [2 * (12 + 39)] * 3 for layer in past.cache.ragged)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_prompt_of_which_a_token_hides_some_is_evicted_behind_that_token(turns):
    """Rows that leave with the mask are no eviction that the prompt has waited for."""
    past = Past(build("llama"), chunks="last")
    for i in range(turns):
        past.feed(20, i, new=PROMPT.mask if i == 0 else None)
        assert all(layer.due for layer in past.cache.ragged)
        past.mask[:, -3:-1] = 0
        past.feed(1, i)
        for layer in past.cache.ragged:
            assert layer.row_counts == [2 * layer.settings.target(n) for n in layer.token_counts] and not layer.due


def test_a_prompt_is_attended_to_in_full_before_the_cap_is_kept():
    past = Past(build("llama"), retention=None, cap=16, interval=3)
    for turns in (1, 2, 3):
        past.feed(20)
        assert all((layer.evictions, layer.row_counts) == (turns, [2 * 16] * 3) for layer in past.cache.ragged)


def test_several_tokens_that_are_no_prompt_stay_below_the_cap():
    past = Past(build("llama"), retention=None, cap=16, interval=3)
    with past.cache.prefill():
        past.feed(15)
    for i in range(6):
        past.feed(5, i)
        assert all(max(layer.row_counts) <= 2 * 16 for layer in past.cache.ragged)


def test_a_hidden_token_makes_place_for_an_earlier_query():
    """And is the first to be overwritten."""
    past = Past(build("llama"), retention=1.0)
    past.feed(20)
    past.mask[:, -2] = 0
    past.feed(1, 1)
    for expected in ([16, 17, 19, 20], [17, 19, 20, 21], [19, 20, 21, 22]):
        for layer in past.cache.ragged:
            _, places, there = layer.observations.queries.read()
            assert places.tolist() == [expected] * 3 and there.all()
        past.feed(1, 2)


WRONG: dict[str, Callable[[RaggedLayer], object]] = {
    "token_counts": lambda layer: [*layer.token_counts[:2], layer.token_counts[2] + 1],
    "row_counts": lambda layer: layer.row_counts[::-1],
    "evicted": lambda layer: 0,
    "evictions": lambda layer: 0,
    "keys": lambda layer: torch.zeros(3, 2, 1, 8),
    "rows": lambda layer: None,
}


@pytest.mark.parametrize("part", WRONG)
def test_every_method_is_looked_at(part):
    """In all tests, whatever they are about: what is wrong with a layer is found behind the next call or method."""
    for act in (lambda past: past.cache.settle(), lambda past: past.cache.evict_due(), lambda past: past.feed(1)):
        past = packed(build("llama"))
        layer = past.cache.ragged[-1]
        setattr(layer, part, WRONG[part](layer))
        with pytest.raises(AssertionError):
            act(past)
