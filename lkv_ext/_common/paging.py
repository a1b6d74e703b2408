"""Pools of pages, for torch and NumPy alike: which table a pool has, and how many bytes its rows and pages are."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple


class Paging(NamedTuple):
    """Of all pools of a call.

    Attributes:
        table: of each kind of pools, the number of its table.
        pages: rows of a page of each table; 1 where the op will refuse the pool.
        row_bytes: of one row of one head in all kinds.
        page_bytes: of a page of each table: all heads that share it, all layers, all kinds with that table.
    """

    table: list[int]
    pages: list[int]
    row_bytes: int
    page_bytes: tuple[int, ...]

    @property
    def largest(self) -> int:
        """Rows that are dropped together where rows move to the back, so that no page is left in part."""
        return max(self.pages)


def paging(kinds: Sequence[Any], tables: Sequence[Any], layers: int = 1) -> Paging:
    """Of one pool of each kind, `[P, H, page, ...]` or `[P, page, ...]`. The last kinds have tables of their own."""
    own = len(tables) - 1
    if len(kinds) <= own:
        raise ValueError("expected at least one pool in pools, got none")
    table = [max(0, i + 1 + own - len(kinds)) for i in range(len(kinds))]
    pages, row_bytes, page_bytes = [1] * len(tables), 0, [0] * len(tables)
    for i, kind in enumerate(kinds):
        axis = 1 if len(tables[table[i]].shape) == 3 else 2
        if len(kind.shape) <= axis:
            continue
        if i == 0 or table[i] > 0:
            pages[table[i]] = max(1, kind.shape[axis])
        size = kind.dtype.itemsize
        row_bytes += size * prod(kind.shape[axis + 1 :])
        page_bytes[table[i]] += layers * size * prod(kind.shape[1:])
    return Paging(table, pages, row_bytes, tuple(page_bytes))


def check_companions(companions: Sequence[Any], tables: Sequence[Any]) -> None:
    """Raises ValueError unless each of `companions` has a table."""
    if len(companions) != len(tables):
        raise ValueError(
            f"expected one of companion_tables for each of companions, got {len(tables)} and {len(companions)}"
        )


def table_name(i: int) -> str:
    """Of the tables of a call: those of the pools, then those of the companions."""
    return "tables" if i == 0 else f"companion_tables[{i - 1}]"


class FreedBytes:
    """What an eviction in pages has kept and freed, in bytes: sums on the device of the index."""

    __slots__ = ()
    lengths: Any
    free_pages: Any
    companion_free_pages: tuple[Any, ...]
    row_bytes: int
    page_bytes: tuple[int, ...]

    @property
    def retained_bytes(self) -> Any:
        """Bytes of the rows kept, in all pools and layers: an int64 scalar on the device of the index."""
        return self.lengths.sum() * self.row_bytes

    @property
    def reclaimable_bytes(self) -> Any:
        """Bytes of the pages that are free, in all pools and layers: an int64 scalar on the device of the index."""
        free = (self.free_pages, *self.companion_free_pages)
        return sum(pages.sum() * size for pages, size in zip(free, self.page_bytes, strict=True))
