"""The cache of one layer of a request, in a pool of pages of one head each that several requests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.kinds import described
from lkv_ext._common.options import MOST, whole
from lkv_ext._torch.append import check_rows
from lkv_ext._torch.attend import attend
from lkv_ext._torch.ints import Ints
from lkv_ext._torch.modes import keeps_tensors
from lkv_ext._torch.paged import evict_paged_
from lkv_ext.ragged import RaggedKV


class Allocator(Protocol):
    """Who knows which pages of a pool are free: a `PageAllocator`, or the engine's own."""

    def take(self, count: int) -> Sequence[int]:
        """So many pages, free no more; raises, and takes none, where there are fewer."""
        ...

    def give(self, pages: Sequence[int]) -> None:
        """Pages that `take` returned and nobody uses any more."""
        ...


class PageAllocator:
    """The free pages of a pool, the one that came back last first. For one thread.

    Attributes:
        pages: pages of the pool.
        free: how many are free.
    """

    def __init__(self, pages: int) -> None:
        try:
            self.pages = whole(pages, "pages")
        except (ValueError, TypeError) as error:
            errors.reraise("PageAllocator", error)
        self._free = list(range(self.pages))[::-1]
        self._taken = bytearray(self.pages)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many pages.

        Raises:
            MemoryError: where fewer are free; none is taken then.
        """
        if count > len(self._free):
            raise MemoryError(
                f"lkv_ext.PageAllocator: expected {count} free pages of {self.pages}, got {len(self._free)}: evict, or "
                "wait for a request to end"
            )
        left = len(self._free) - count
        taken = self._free[left:][::-1]
        del self._free[left:]
        for page in taken:
            self._taken[page] = 1
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """Pages that are free from now on.

        Raises:
            ValueError: for a page that is not taken, or is given twice; none is free then.
        """
        once = set(pages)
        wrong = [page for page in pages if not 0 <= page < self.pages or not self._taken[page]]
        if wrong or len(once) != len(pages):
            page = wrong[0] if wrong else next(page for page in once if list(pages).count(page) > 1)
            raise ValueError(f"lkv_ext.PageAllocator: expected pages that were taken, each once, got page {page}")
        for page in pages:
            self._taken[page] = 0
        self._free.extend(reversed(pages))


class PagedCache:
    """K and V of one layer of a request, in which every (sequence, KV head) has pages of its own: `RaggedCache.paged`.

    A page holds rows of one head, so that a head that keeps little frees what it leaves. Token `t` of a head lies in
    row `t % page` of page `tables[b, h, t // page]`; appends take pages from the allocator and evictions return them.

    Attributes:
        k: the pool `[P, page, D]`, shared with other caches. v: `[P, page, Dv]`.
        companions: more pools `[P, page, ...]`, whose rows move with those of K and V.
        tables: int32 `[B, H, M]`; what is behind the pages in use is stale.
        lengths: int32 `[B, H]`, rows in use. max_length: the largest of them, on the host.
        seen: tokens appended so far, evicted ones included: the logical length.
        align: rows of a page.
    """

    @keeps_tensors
    def __init__(self, pools: Sequence[Tensor], allocator: Allocator, *, heads: int, batch: int = 1) -> None:
        """A cache without rows: takes no page yet. Arguments and errors as in `RaggedCache.paged`."""
        try:
            batch, heads = whole(batch, "batch"), whole(heads, "heads")
            self.k, self.v, *companions = _checked(pools)
            self.companions = tuple(companions)
            for name in ("take", "give"):
                if not callable(getattr(allocator, name, None)):
                    raise TypeError(f"expected an allocator with take and give, got {described(allocator)}")
        except (ValueError, TypeError) as error:
            errors.reraise("RaggedCache.paged", error)
        self.allocator, self.align = allocator, self.k.shape[1]
        self.seen = self.max_length = 0
        self.lengths = torch.zeros(batch, heads, dtype=torch.int32, device=self.k.device)
        self.tables = torch.zeros(batch, heads, 0, dtype=torch.int32, device=self.k.device)
        self._counts = [0] * (batch * heads)  # `lengths` on the host
        self._pages: list[list[int]] = [[] for _ in self._counts]  # `tables` on the host

    @property
    def pages(self) -> int:
        """Pages that the cache holds."""
        return sum(map(len, self._pages))

    @property
    def block_table(self) -> Tensor:
        """int32 `[B * H, M]`: the tables as kernels with one KV head read them."""
        return self.tables.flatten(0, 1)

    @keeps_tensors
    def append(self, k: Tensor, v: Tensor, companions: Sequence[Tensor] = ()) -> None:
        """Writes n new tokens behind the rows of every head, into pages that it takes where the last one is full.

        Args:
            k: `[B, H, n, D]`. v: `[B, H, n, Dv]`. companions: `[B, H, n, ...]`, one for each of the cache's.

        Raises:
            ValueError, TypeError: for another shape, dtype or device than the cache's.
            MemoryError: where the pool has too few free pages. The cache and the pool are as they were.
        """
        rows, pools = [k, v, *companions], [self.k, self.v, *self.companions]
        names = ["k", "v", *(f"companions[{i}]" for i in range(len(self.companions)))]
        try:
            check_rows(rows, [pool[:, 0] for pool in pools], names, *self.lengths.shape)
            count = k.shape[2]
            if self.seen + count > MOST:
                raise ValueError(f"expected at most 2**31 - 1 tokens, got {count} after {self.seen}")
            self._reach([held + count for held in self._counts])
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            errors.reraise("PagedCache.append", error, names, given=locals())
        places = self.lengths[..., None].long() + torch.arange(count, device=self.k.device)
        ids = self.tables.gather(2, places // self.align).long()
        for pool, new in zip(pools, rows, strict=True):
            pool[ids, places % self.align] = new
        self.lengths = self.lengths + count
        self._counts = [held + count for held in self._counts]
        self.max_length = max(self._counts, default=0)
        self.seen += count

    @keeps_tensors
    def evict(self, scores: Tensor, budgets: Ints, *, sink: int = 0, window: int = 0) -> None:
        """Keeps the `budgets` best rows of every head, in place, and returns the pages that are free to the allocator.

        Synchronises on CUDA, as the allocator is on the host.

        Args:
            scores: `[B, H, C]` over the rows of every head, C at least `max_length`; any dtype of `lkv_ext.evict`.
            budgets: rows to keep per head: an int, `[H]` or `[B, H]`.
            sink: as in `lkv_ext.evict`.
            window: as in `lkv_ext.evict`.

        Raises:
            ValueError, TypeError: as `lkv_ext.evict_paged_`, before anything changes.
        """
        batch, heads = self.lengths.shape
        try:
            expected = f"expected scores of shape [B, H, C] = {[batch, heads, self.max_length]}"
            if not isinstance(scores, Tensor) or scores.dim() != 3 or scores.shape[2] < self.max_length:
                raise ValueError(f"{expected}, got {described(scores)}")
            pools, ranking = [self.k, self.v, *self.companions], scores[..., : self.max_length]
            if tuple(scores.shape[:2]) != (batch, heads):
                raise ValueError(f"{expected}, got {list(scores.shape)}")
            held = self.lengths
            if not held.is_cuda:
                held = torch.tensor(self._counts, dtype=torch.int64, device="cpu").view(batch, heads)
            index = evict_paged_(pools, ranking, budgets, self.tables, held, sink=sink, window=window)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            errors.reraise("PagedCache.evict", error, given=locals())
        self.lengths = index.lengths
        self._counts = index.lengths.flatten().tolist()
        self.max_length = max(self._counts, default=0)
        self._return()

    def attend(
        self,
        q: Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """`lkv_ext.attend(q, self)`, with its arguments and errors: q `[B, Hq, n, D]` to `[B, Hq, n, Dv]`."""
        return attend(q, self, causal, scale=scale, softcap=softcap, sinks=sinks, backend=backend)

    def packed(self) -> RaggedKV:
        """A copy of the rows in use, one head behind the other, as of `lkv_ext.evict`; `positions` are places here."""
        counts = torch.tensor(self._counts, dtype=torch.int64, device="cpu")
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        total, device = int(ends[-1]), self.k.device
        segment = torch.arange(len(counts), device="cpu").repeat_interleave(counts, output_size=total)
        places = (torch.arange(total, device="cpu") - ends[segment]).to(device)
        ids = self.block_table[segment.to(device), places // self.align].long()
        k, v, *companions = (pool[ids, places % self.align] for pool in (self.k, self.v, *self.companions))
        offsets = ends.int().to(device)
        return RaggedKV(k, v, tuple(companions), places.int(), self.lengths, offsets, self.max_length)

    @keeps_tensors
    def free(self) -> None:
        """Returns all pages to the allocator: the request has ended. The cache is empty then, and may be used again."""
        self._counts = [0] * len(self._counts)
        self.lengths = torch.zeros_like(self.lengths)
        self.max_length = self.seen = 0
        self._return()

    def _reach(self, counts: Sequence[int]) -> None:
        """Takes the pages that so many rows need. Where that raises, nothing has changed."""
        missing = [-(-count // self.align) - len(held) for count, held in zip(counts, self._pages, strict=True)]
        if not any(missing):
            return
        taken = list(self.allocator.take(sum(missing)))
        if len(taken) != sum(missing) or not all(0 <= page < len(self.k) for page in taken):
            self.allocator.give(taken)
            raise ValueError(f"expected {sum(missing)} pages in [0, {len(self.k)}) from the allocator, got {taken}")
        columns = max(len(held) + more for held, more in zip(self._pages, missing, strict=True))
        if columns > self.tables.shape[2]:
            grown = max(columns, 2 * self.tables.shape[2])
            self.tables = torch.nn.functional.pad(self.tables, (0, grown - self.tables.shape[2]))
        at: list[int] = []
        width, left = self.tables.shape[2], iter(taken)
        for segment, (held, more) in enumerate(zip(self._pages, missing, strict=True)):
            at += range(segment * width + len(held), segment * width + len(held) + more)
            held += [next(left) for _ in range(more)]
        where, ids = torch.tensor([at, taken], device=self.k.device)
        self.tables.view(-1)[where] = ids.int()

    def _return(self) -> None:
        """Gives the allocator the pages behind the rows in use."""
        free: list[int] = []
        for held, count in zip(self._pages, self._counts, strict=True):
            needed = -(-count // self.align)
            free += held[needed:]
            del held[needed:]
        if free:
            self.allocator.give(free)

    def __repr__(self) -> str:
        return (
            f"PagedCache(pages={self.pages} of {self.align} rows, lengths={list(self.lengths.shape)}, "
            f"max_length={self.max_length}, seen={self.seen}, {self.k.device})"
        )


def _checked(pools: Sequence[Tensor]) -> list[Tensor]:
    """Pools of pages `[P, page, ...]`, K and V first."""
    found = list(pools)
    for i, pool in enumerate(found):
        if not isinstance(pool, Tensor) or pool.dim() < 2 or (i < 2 and pool.dim() != 3):
            raise ValueError(
                f"expected pools[{i}] of shape [P, page, {'D' if i < 2 else '...'}], got {described(pool)}"
            )
        if pool.shape[:2] != found[0].shape[:2] or pool.device != found[0].device:
            raise ValueError(
                f"expected pools[{i}] with pages [P, page] = {list(found[0].shape[:2])} on {found[0].device} as in "
                f"pools[0], got {list(pool.shape)} on {pool.device}"
            )
        if pool.is_inference() or pool.requires_grad:
            raise ValueError(f"expected pools[{i}] that can be written to outside of inference mode, without gradients")
    if len(found) < 2:
        raise ValueError(f"expected pools of K and V, got {len(found)} of them")
    page = found[0].shape[1]
    if page < 1 or page & (page - 1):
        raise ValueError(f"expected pages of a power of two of rows, got pools[0] of shape {list(found[0].shape)}")
    return found
