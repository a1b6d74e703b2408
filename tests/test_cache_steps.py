"""Random steps of a RaggedCache, one after the other: what `invariants` checks after each of them is the test."""

from __future__ import annotations

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from cache_model import filled, tokens
from cases import generator, rows_of, scores_of
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import STEPS as WATCHED
from torch import Tensor

import lkv_ext
from lkv_ext import RaggedCache

HEADS, DIM, DIM_V = 2, 3, 2
STEPS = ("append", "append", "append padded", "evict", "crop", "restore", "select_batch", "load", "pickle", "wrong")


class Run:
    """A cache and what of its past the next step may refer to."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.seed = draw, 0
        self.batch, self.companions = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        self.align = draw(st.sampled_from([1, 1, 4]))
        reserve = draw(st.integers(1, 9))
        made = draw(st.sampled_from(["empty", "alone", "layer"] if self.companions == 0 else ["alone", "layer"]))
        if made == "empty":
            self.cache = RaggedCache.empty(
                self.batch, HEADS, DIM, dim_v=DIM_V, dtype_v=torch.bfloat16, reserve=reserve, align=self.align
            )
        else:
            self.cache = self.evicted(draw(st.integers(1, 12)), reserve, joint=made == "layer")
        self.mark, self.kept = self.cache.mark(), [0] * self.batch

    def rows(self, count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        self.seed += 9
        shape = [self.batch, HEADS, count]
        k, v = rows_of([*shape, DIM], torch.float32, self.seed), rows_of([*shape, DIM_V], torch.bfloat16, self.seed + 1)
        dtypes = ((torch.uint8, (2,)), (torch.float64, ()))
        return k, v, [rows_of([*shape, *dtypes[i][1]], dtypes[i][0], self.seed + 2 + i) for i in range(self.companions)]

    def evicted(self, tokens: int, reserve: int, *, joint: bool) -> RaggedCache:
        """A cache of one layer, or the middle one of three that share their buffers."""
        budgets = self.draw(st.lists(st.integers(0, tokens), min_size=HEADS, max_size=HEADS))
        k, v, companions = self.rows(tokens)
        scores = scores_of("ties", [self.batch, HEADS, tokens], self.seed)
        options = dict(reserve=reserve, align=self.align)
        if not joint:
            return RaggedCache(lkv_ext.evict(k, v, scores, budgets, companions=companions, **options), tokens)
        many = [k.neg(), k, k.clone()], [v.neg(), v, v.clone()], torch.stack([-scores, scores, scores])
        moved = [[c.clone(), c, c.clone()] for c in companions]
        return RaggedCache(lkv_ext.evict_layers(*many, [budgets] * 3, companions=moved, **options).layer(1), tokens)

    def forget(self) -> None:
        self.mark, self.kept = self.cache.mark(), [0] * self.batch

    def step(self, what: str) -> None:
        draw, cache = self.draw, self.cache
        if what.startswith("append"):
            count = draw(st.integers(0, 12))
            valid = None
            if "padded" in what:
                valid = draw(st.lists(st.integers(0, count), min_size=self.batch, max_size=self.batch))
            cache.append(*self.rows(count), valid=torch.tensor(valid) if valid and draw(st.booleans()) else valid)
            self.kept = [n + more for n, more in zip(self.kept, valid or [count] * self.batch, strict=True)]
        elif what == "evict":
            sizes = draw(st.sampled_from([[HEADS], [self.batch, HEADS]]))
            count = torch.Size(sizes).numel()
            budgets = torch.tensor(draw(st.lists(st.integers(-1, 12), min_size=count, max_size=count))).view(sizes)
            limit = draw(st.sampled_from([None, None, 3]))
            reserve, ends = draw(st.integers(0, 9)), dict(sink=draw(st.integers(0, 2)), window=draw(st.integers(0, 3)))
            scores = torch.randn(cache.k.shape[0], generator=generator(self.seed))
            cache.evict(scores, budgets, max_budget=limit, reserve=reserve, **ends)
            self.forget()
        elif what == "crop":
            cache.crop(draw(st.integers(0, cache.mark()[1])))
            self.forget()
        elif what == "restore":
            cache.restore(self.mark, self.kept)
            self.forget()
        elif what == "select_batch":
            order = draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
            cache.select_batch(torch.tensor(order) if draw(st.booleans()) else order)
            self.batch = len(order)
            self.forget()
        elif what == "load":
            with TemporaryDirectory() as folder:
                cache.save(Path(folder) / "cache")
                self.swap(RaggedCache.load(Path(folder) / "cache"))
        elif what == "pickle":
            self.swap(pickle.loads(pickle.dumps(cache)))
        else:
            with pytest.raises(ValueError):
                cache.crop(cache.mark()[1] + 1)
            with pytest.raises(ValueError):
                cache.select_batch([self.batch])
            with pytest.raises(ValueError):
                cache.append(*self.rows(3)[:2], [], valid=[1] * (self.batch + 1))

    def swap(self, again: RaggedCache) -> None:
        """The same in other memory: what they say of themselves, and what they do next."""
        for name in (*("k", "v", "positions", "lengths", "cu_seqlens"), "companions"):
            mine, theirs = getattr(self.cache, name), getattr(again, name)
            pairs = zip(mine, theirs, strict=True) if name == "companions" else [(mine, theirs)]
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
        for name in ("seen", "max_length", "align", "_free", "_tail", "_reserve"):
            assert getattr(again, name) == getattr(self.cache, name)
        self.cache = again


@settings(max_examples=120)
@given(st.data())
def test_steps(data: st.DataObject) -> None:
    run = Run(data.draw)
    for what in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=10)):
        run.step(what)


@settings(max_examples=60)
@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=2, max_size=2))))
def test_restore_whatever_came(reserve: int, appends: list[tuple[int, list[int]]]) -> None:
    """Growth reads lengths that padding has kept short: what is taken back leaves as much slack as there is."""
    cache, model = filled(reserve=reserve)
    mark, kept = cache.mark(), [0, 0]
    for count, valid in appends:
        k, v = tokens(count)
        cache.append(k, v, valid=[min(n, count) for n in valid])
        kept = [n + min(new, count) for n, new in zip(kept, valid, strict=True)]
    cache.restore(mark, kept)
    model.check(cache)
    k, v = tokens(sum(count for count, _ in appends))
    cache.append(k, v)
    model.append(k, v)
    model.check(cache)


IDLE = {
    "append": lambda cache: cache.append(*tokens(0)),
    "evict": lambda cache: cache.evict(cache.packed(torch.zeros(2, 3, cache.max_length)), cache.max_length),
    "crop": lambda cache: cache.crop(0),
    "restore": lambda cache: cache.restore(cache.mark(), [0, 0]),
    "select_batch": lambda cache: cache.select_batch([0, 1]),
    "reorder": lambda cache: cache.reorder([0, 1]),
    "to": lambda cache: cache.to("cpu"),
}
WRONG = {
    "k": lambda cache: cache.k[1:],
    "companions": lambda cache: (cache.k[1:],),
    "positions": lambda cache: cache.positions.flip(0),
    "lengths": lambda cache: cache.lengths - 1,
    "cu_seqlens": lambda cache: cache.cu_seqlens + 1,
    "seen": lambda cache: cache.seen - 1,
    "max_length": lambda cache: cache.max_length - 1,
    "_free": lambda cache: cache._free + 1000,
    "_tail": lambda cache: cache._tail + 1,
}


@pytest.mark.parametrize("step, part", [*((step, "seen") for step in WATCHED), *(("crop", part) for part in WRONG)])
def test_every_step_is_looked_at(step: str, part: str) -> None:
    """In all tests, whatever they are about: what is wrong with a cache is found behind its next step."""
    cache = filled()[0]
    IDLE[step](cache)
    setattr(cache, part, WRONG[part](cache))
    with pytest.raises(AssertionError):
        IDLE[step](cache)
