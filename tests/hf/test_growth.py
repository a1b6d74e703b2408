"""Memory does not grow: over turns below a cap, over resets, forks and calls that failed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from families import build, call, tokens
from test_bookkeeping import ALL, Past, Stop, stopping
from torch import Tensor

import lkv
from lkv.policies import SnapKV


def reachable(*roots: object) -> tuple[int, int]:
    """Tensors that a cache holds, and their bytes; each storage once."""
    storages, seen, stack = {}, set(), list(roots)
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (type, torch.nn.Module)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        else:
            stack += gc.get_referents(value)
    return len(storages), sum(storages.values())


def counts(cache: lkv.Cache) -> tuple[int, int]:
    return reachable([vars(layer) for layer in cache.layers], vars(cache.history))


def test_capped_decoding_with_queries():
    """The same at every step at which the same rows are there."""
    model = build("llama")
    cache, sizes = lkv.Cache(model, SnapKV(window=4), cap=16, interval=4, reserve=8), {}
    with torch.no_grad():
        call(model, tokens(2, 16), None, cache)
        for i in range(80):
            call(model, tokens(2, 1, i), None, cache)
            if i >= 16:
                sizes.setdefault(cache.ragged[0].row_counts[0], set()).add(counts(cache)[1])
    assert len(sizes) == 4 and all(len(each) == 1 for each in sizes.values()), sizes


@pytest.mark.parametrize("family", ["llama", "gemma3", "nondefault"])
def test_resets(family):
    """With all that can be observed, after a conversation and a call that failed."""
    past, sizes = Past(build(family)), []
    for _ in range(4):
        past.cache.reset()
        past.mask = past.mask[:, :0]
        empty = counts(past.cache)
        with past.cache.prefill():
            past.feed(20)
        past.feed(3)
        with pytest.raises(Stop), stopping(past.model.get_decoder().layers[-1]):
            past.feed(2)
        past.mask = past.mask[:, :-2]
        past.feed(4)
        sizes.append((empty, counts(past.cache)))
    assert sizes == sizes[:1] * 4 and sizes[0][0] < sizes[0][1]


def test_hidden_states_and_rotations_are_those_of_the_tokens():
    """As many as there are tokens, whatever was evicted and however they came."""
    model = build("llama")
    cache = lkv.Cache(model, SnapKV(window=4), retention=0.3, observe=ALL)
    with torch.no_grad():
        for count in (20, 1, 1, 7):
            call(model, tokens(2, count), None, cache)
    observations = cache.ragged[0].observations
    assert observations.hidden_states.read().shape == (2, 29, 32)
    assert observations.rotary.cos.read().shape[1] == 29 and len(cache.history.rotations.all) == 1


def test_forks_and_failed_calls_leave_nothing():
    """Neither tensors nor caches stay behind, not even until the next collection."""
    past = Past(build("llama"), retention=0.5)
    past.feed(20)
    mask, sizes = past.mask, []
    fork = past.cache.fork()
    past.feed(1, cache=fork)
    kept = [weakref.ref(part) for part in (fork, fork.history, *fork.layers, fork.ragged[0].observations)]
    tensors = [weakref.ref(t) for layer in fork.ragged for t in (layer.rows.k, layer.rows.v)]
    del fork
    assert all(ref() is None for ref in kept + tensors)
    for _ in range(4):
        past.mask = mask
        past.cache.settings = Past(past.model, chunks="last").cache.settings
        with pytest.raises(Stop), stopping(past.model.model.norm):
            past.feed(5)
        sizes.append(counts(past.cache))
    assert sizes[1:] == sizes[1:2] * 3  # the first used the slack up
