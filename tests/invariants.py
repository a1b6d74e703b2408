"""What is true of every RaggedCache, and of every step from one state to the next: looked at in all tests.

`watched` wraps the public methods, so that a test of whatever subject checks the bookkeeping of the caches it uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from unittest import mock

import torch
from cases import bits
from torch import Tensor

from lkv_ext import RaggedCache
from lkv_ext._torch.modes import traced

BIT = 2**32  # of a key, the segment is above it
COUNTS = ("seen", "max_length", "align", "_tail", "_free", "_reserve")


def _spread(values: Tensor, counts: Tensor) -> Tensor:
    return values.repeat_interleave(counts, output_size=int(counts.sum()))


def rows_in_use(cache: RaggedCache) -> tuple[Tensor, Tensor]:
    """For all rows in use, in order: the segment of each (b * H + h), and where in the buffers it lies."""
    used, begins = cache.lengths.flatten().long(), cache.cu_seqlens[:-1].long()
    places = torch.arange(int(used.sum()), device=used.device) + _spread(begins - used.cumsum(0) + used, used)
    return _spread(torch.arange(used.numel(), device=used.device), used), places


def check_cache(cache: RaggedCache) -> None:
    """Whether the parts of a cache agree with each other. Reads its tensors, which synchronises on CUDA."""
    parts = {name: getattr(cache, name) for name in ("k", "v", "positions", "lengths", "cu_seqlens")}
    parts |= {f"companions[{i}]": c for i, c in enumerate(cache.companions)}
    rows, (batch, heads) = cache.k.shape[0], cache.lengths.shape
    for name, t in parts.items():
        assert t.device == cache.device and t.is_contiguous() and not t.requires_grad, name
        assert name in ("lengths", "cu_seqlens") or t.shape[0] == rows, f"{name} has as many rows as k"
        assert torch.is_inference_mode_enabled() or not t.is_inference(), f"{name} can be written to"
    assert cache.k.dim() == cache.v.dim() == 2 and isinstance(cache.companions, tuple)
    assert cache.positions.shape == (rows,) and cache.cu_seqlens.shape == (batch * heads + 1,)
    assert {parts[name].dtype for name in ("positions", "lengths", "cu_seqlens")} == {torch.int32}
    assert all(type(getattr(cache, name)) is int for name in COUNTS), "counts are ints of the host"
    assert min(cache.seen, cache.max_length, cache._tail, cache._free) >= 0 and min(cache.align, cache._reserve) >= 1
    assert cache._tail <= cache.seen

    offsets, used = cache.cu_seqlens.long(), cache.lengths.flatten().long()
    spans = offsets.diff()
    assert int(offsets[0]) == 0 and int(offsets[-1]) <= rows, "spans lie in the buffers, from row 0 on"
    assert not (offsets % cache.align).any() and rows % cache.align == 0, "spans are whole pages"
    if used.numel():
        assert int(spans.min()) >= 0, "spans do not overlap"
        assert int(used.min()) >= cache._tail and int((spans - used).min()) >= cache._free, "rows lie in their spans"
        assert int(used.max()) <= cache.max_length, "max_length bounds the lengths"

    segment, places = rows_in_use(cache)
    positions = cache.positions[places].long()
    assert ((positions >= 0) & (positions < cache.seen)).all(), "positions are those of tokens seen"
    assert ((positions.diff() > 0) | (segment.diff() > 0)).all(), "positions ascend in every segment"
    last = torch.arange(places.numel(), device=places.device) - _spread(used.cumsum(0), used)  # -1: of its segment
    recent = last >= -cache._tail
    assert torch.equal(positions[recent], cache.seen + last[recent]), "the tail is the last tokens"
    _check_sizes(cache, sum(t[places].nbytes for t in (cache.k, cache.v, *cache.companions)))


def _check_sizes(cache: RaggedCache, used_bytes: int) -> None:
    assert cache.nbytes == sum(t.nbytes for t in (cache.k, cache.v, *cache.companions))
    assert cache.retained_bytes == used_bytes
    table, pages = cache.block_table, -(-cache.max_length // cache.align)
    assert (table is None) == (cache.align == 1)
    if table is not None:
        assert table.shape == (cache.lengths.numel(), pages) and table.dtype == torch.int32
        of_span = cache.cu_seqlens[:-1, None] // cache.align + torch.arange(pages, device=table.device)
        needed = of_span * cache.align < (cache.cu_seqlens[:-1] + cache.lengths.flatten())[:, None]
        assert torch.equal(table[needed], of_span[needed].int()), "the pages of a segment in order"
        assert ((table >= 0) & (table < max(cache.k.shape[0] // cache.align, 1))).all(), "pages that are there"


@dataclass
class Snapshot:
    """What a cache holds, wherever it lies: every row of every segment by the position of its token."""

    seen: int
    max_length: int
    tail: int
    lengths: Tensor
    keys: Tensor  # int64, ascending: segment * 2**32 + position
    rows: list[Tensor]  # bits of k, v and companions, in the order of the keys

    @classmethod
    def of(cls, cache: RaggedCache) -> Snapshot:
        segment, places = rows_in_use(cache)
        rows = [bits(t[places]) for t in (cache.k, cache.v, *cache.companions)]
        keys = segment * BIT + cache.positions[places]
        return cls(cache.seen, cache.max_length, cache._tail, cache.lengths.clone(), keys, rows)

    def holds(self, keys: Tensor, rows: list[Tensor]) -> bool:
        return torch.equal(self.keys, keys) and all(torch.equal(a, b) for a, b in zip(self.rows, rows, strict=True))

    def holds_of(self, other: Snapshot, which: Tensor) -> bool:
        """Exactly the rows of the other at `which`, a mask or places."""
        return self.holds(other.keys[which], [t[which] for t in other.rows])

    def holds_some_of(self, other: Snapshot) -> bool:
        at = torch.searchsorted(other.keys, self.keys).clamp_(max=max(other.keys.numel() - 1, 0))
        return self.holds_of(other, at) if other.keys.numel() else not self.keys.numel()

    @property
    def longest(self) -> int:
        return int(self.lengths.max()) if self.lengths.numel() else 0


def _is_as_it_was(old: Snapshot, new: Snapshot) -> None:
    assert (new.seen, new.tail) == (old.seen, old.tail) and new.max_length <= old.max_length
    assert torch.equal(new.lengths, old.lengths) and new.holds(old.keys, old.rows)


def _append(old: Snapshot, new: Snapshot, k: Tensor, v: Tensor, companions=(), *, valid=None) -> None:
    batch, heads, count = k.shape[:3]
    counts = torch.as_tensor(count if valid is None else valid, device=k.device).long().clamp(0, count).expand(batch)
    first = count - counts
    steps = torch.arange(count, device=k.device)
    added = (steps >= first[:, None, None]).expand(batch, heads, count)
    segment = torch.arange(batch * heads, device=k.device).view(batch, heads, 1)
    keys = torch.cat([old.keys, (segment * BIT + old.seen + steps)[added]]).sort()
    rows = [torch.cat([a, bits(t[added])])[keys.indices] for a, t in zip(old.rows, (k, v, *companions), strict=True)]
    assert new.holds(keys.values, rows), "the tokens that are real, behind what was there"
    assert new.seen == old.seen + count and new.tail == (old.tail + count if valid is None else 0)
    assert old.longest + count <= new.max_length <= old.max_length + count


def _evict(old: Snapshot, new: Snapshot, scores, budgets, *, sink=0, window=0, max_budget=None, reserve=None) -> None:
    given = torch.as_tensor(getattr(budgets, "budgets_tensor", budgets), device=old.lengths.device).long()
    kept = old.lengths.minimum(given.clamp(0, 2**31 - 1 if max_budget is None else max_budget))
    assert torch.equal(new.lengths, kept.int()), "as many rows as the budgets, of those that are there"
    assert new.holds_some_of(old)
    assert (new.seen, new.tail) == (old.seen, 0)
    assert new.max_length == new.longest or new.lengths.is_cuda, "on the host the maximum is known"


def _crop(old: Snapshot, new: Snapshot, tokens: int) -> None:
    assert new.holds_of(old, old.keys % BIT < old.seen - tokens), "all but the last tokens"
    assert (new.seen, new.tail, new.max_length) == (old.seen - tokens, old.tail - tokens, old.max_length - tokens)


def _restore(old: Snapshot, new: Snapshot, mark: tuple[int, int, int], rows) -> None:
    assert (new.seen, new.tail) == mark[:2] and new.max_length <= mark[2]
    assert new.holds_of(old, old.keys % BIT < mark[0]), "all but what came since"


def _select_batch(old: Snapshot, new: Snapshot, indices) -> None:
    heads, segment = old.lengths.shape[1], old.keys // BIT
    order = torch.as_tensor(indices, device=old.keys.device).long().flatten()
    wanted = (order[:, None] * heads + torch.arange(heads, device=order.device)).flatten()
    at = torch.cat(
        [torch.zeros(0, dtype=torch.long, device="cpu"), *((segment == r).nonzero()[:, 0].cpu() for r in wanted)]
    )
    of = torch.arange(wanted.numel(), device="cpu").repeat_interleave(old.lengths.flatten()[wanted].cpu())
    moved = of.to(old.keys.device) * BIT + old.keys[at] % BIT
    assert new.holds(moved, [t[at] for t in old.rows]), "the chosen sequences, in that order"
    assert (new.seen, new.tail, new.max_length) == (old.seen, old.tail, old.max_length)


def _to(old: Snapshot, new: Snapshot, device) -> None:
    assert (new.seen, new.tail, new.max_length) == (old.seen, old.tail, old.max_length)


STEPS: dict[str, Callable[..., None]] = {
    "append": _append,
    "evict": _evict,
    "crop": _crop,
    "restore": _restore,
    "select_batch": _select_batch,
    "reorder": lambda old, new, beams: _select_batch(old, new, beams),
    "to": _to,
}


def _readable(*tensors: object) -> bool:
    """Whether the host may read these now: not where a tracer runs, nor where a GPU must not be waited for."""
    if _looking_away:
        return False
    if any(isinstance(t, Tensor) and (t.is_meta or traced(t)) for t in tensors) or torch.compiler.is_compiling():
        return False
    on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in tensors)
    return not on_gpu or not (torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode())


def _step(name: str, method: Callable, check: Callable[..., None]) -> Callable:
    @wraps(method)
    def run(cache: RaggedCache, *args: object, **kwargs: object) -> object:
        if not _readable(cache.k, cache.lengths):
            return method(cache, *args, **kwargs)
        old = Snapshot.of(cache)
        try:
            result = method(cache, *args, **kwargs)
        except Exception:
            check_cache(cache)
            _is_as_it_was(old, Snapshot.of(cache))
            raise
        with torch.no_grad():
            check_cache(cache)
            check(old, Snapshot.of(cache), *args, **kwargs)
        return result

    return run


def _making(method: Callable) -> Callable:
    @wraps(method)
    def run(cache: RaggedCache, *args: object, **kwargs: object) -> None:
        method(cache, *args, **kwargs)
        if _readable(cache.k, cache.lengths):
            check_cache(cache)

    return run


_looking_away: list[bool] = []


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """For tests in which somebody else writes to a cache."""
    _looking_away.append(True)
    try:
        yield
    finally:
        _looking_away.pop()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Every cache that is made, and every step of one, is looked at."""
    made = RaggedCache.load.__func__

    @wraps(made)
    def load(cls: type[RaggedCache], *args: object, **kwargs: object) -> RaggedCache:
        cache = made(cls, *args, **kwargs)
        check_cache(cache)
        return cache

    with contextlib.ExitStack() as stack:
        for name, check in STEPS.items():
            method = _step(name, getattr(RaggedCache, name), check)
            stack.enter_context(mock.patch.object(RaggedCache, name, method))
        for name in ("__init__", "__setstate__"):
            stack.enter_context(mock.patch.object(RaggedCache, name, _making(getattr(RaggedCache, name))))
        stack.enter_context(mock.patch.object(RaggedCache, "load", classmethod(load)))
        yield
