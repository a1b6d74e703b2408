"""What the launchers must compute, written again in NumPy, one segment after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Segments:
    """The segments of an op; `lengths`, `starts` and `budgets` broadcast to [layers, batch, heads]."""

    layers: int
    batch: int
    heads: int
    tokens: list[int]
    lengths: np.ndarray
    starts: np.ndarray
    budgets: np.ndarray
    cu_seqlens: np.ndarray | None = None

    @property
    def count(self) -> int:
        return self.layers * self.batch * self.heads

    def place(self, row: int) -> tuple[int, int, int]:
        return row // self.heads // self.batch, row // self.heads % self.batch, row % self.heads

    def bounds(self, row: int) -> tuple[int, int]:
        """(origin, limit): where position 0 lies in the tensor, and how many positions there are."""
        tokens = self.tokens[self.place(row)[0]]
        if self.cu_seqlens is None:
            return 0, tokens
        origin = clamp(self.cu_seqlens[row], 0, tokens)
        return origin, clamp(self.cu_seqlens[row + 1], origin, tokens) - origin

    def valid(self, row: int) -> tuple[int, int]:
        """(begin, length) of the valid positions."""
        limit = self.bounds(row)[1]
        begin = clamp(self._of(self.starts, row), 0, limit)
        return begin, clamp(self._of(self.lengths, row), 0, limit - begin)

    def budget(self, row: int) -> int:
        return self._of(self.budgets, row)

    def _of(self, values: np.ndarray, row: int) -> int:
        return int(np.broadcast_to(values, (self.layers, self.batch, self.heads))[self.place(row)])


@dataclass
class Layout:
    """How the output is cut into spans; a negative max_budget or padded is none."""

    max_budget: int
    reserve: int
    align: int
    padded: int
    total: int
    page: int = 1  # what is dropped is a multiple of so many rows
    to_back: bool = False  # where a compaction moves to
    any_order: bool = False


@dataclass
class Spans:
    lengths: np.ndarray
    cu_seqlens: np.ndarray
    overflow: int


def clamp(x: int, low: int, high: int) -> int:
    return int(min(max(x, low), high))


def spans(segments: Segments, layout: Layout) -> Spans:
    out = Spans(np.zeros(segments.count, np.int32), np.zeros(segments.count + 1, np.int32), 0)
    end = 0
    for row in range(segments.count):
        length = segments.valid(row)[1]
        wanted = clamp(segments.budget(row), 0, length)
        keep = wanted if layout.max_budget < 0 else min(wanted, layout.max_budget)
        wanted, keep = (length - (length - n) // layout.page * layout.page for n in (wanted, keep))
        if layout.padded >= 0:
            keep, span = min(keep, layout.padded), layout.padded
        else:
            span = -(-(keep + layout.reserve) // layout.align) * layout.align
        begin = min(end, layout.total)
        out.cu_seqlens[row] = begin
        out.lengths[row] = min(keep, layout.total - begin)
        out.overflow += wanted - out.lengths[row]
        end += span
    out.cu_seqlens[-1] = min(end, layout.total)
    return out


def select(segments: Segments, scores: list[np.ndarray], sink: int, window: int, out: Spans, total: int) -> np.ndarray:
    """`scores` per layer: [batch, heads, tokens], ragged: [1, 1, T]."""
    positions = np.full(total, -1, np.int32)
    for row in range(segments.count):
        layer, b, h = segments.place(row)
        origin, (begin, length) = segments.bounds(row)[0], segments.valid(row)
        keep = int(out.lengths[row])
        first = min(sink, keep)
        last = min(window, keep - first)
        if segments.cu_seqlens is not None:
            b = h = 0
        low, high = begin + first, begin + length - last
        between = scores[layer][b, h, origin + low : origin + high].astype(np.float64)
        best = np.lexsort((np.arange(between.size), -between, np.isnan(between)))[: keep - first - last]
        kept = np.concatenate([np.arange(begin, low), low + np.sort(best), np.arange(high, begin + length)])
        positions[out.cu_seqlens[row] :][:keep] = kept
    return positions


def gather(segments: Segments, payload: list[np.ndarray], positions: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """`payload` per layer: bytes [batch, heads, tokens, row_bytes], ragged: [1, 1, T, row_bytes]."""
    out = np.zeros((positions.size, payload[0].shape[-1]), np.uint8)
    for row in range(segments.count):
        layer, b, h = segments.place(row)
        origin, limit = segments.bounds(row)
        if segments.cu_seqlens is not None:
            b = h = 0
        for j in range(cu_seqlens[row], cu_seqlens[row + 1]):
            if 0 <= positions[j] < limit:
                out[j] = payload[layer][b, h, origin + positions[j]]
    return out


def sources(kept: np.ndarray, to: np.ndarray, any_order: bool) -> np.ndarray:
    """The rows that the slots `to` get. In any order, those that lie there stay, and the hole that is farthest from the
    others gets the farthest of them."""
    if not any_order:
        return kept
    there = to.copy()
    there[~np.isin(to, kept)] = kept[~np.isin(kept, to)][::-1]
    return there


def compact(
    segments: Segments, payload: list[np.ndarray], positions: np.ndarray, out: Spans, layout: Layout
) -> tuple[list[np.ndarray], np.ndarray]:
    """The payload afterwards, and the positions by the rows where they are now."""
    moved, filled = [layer.copy() for layer in payload], positions.copy()
    for row in range(segments.count):
        layer, b, h = segments.place(row)
        origin = segments.bounds(row)[0]
        if segments.cu_seqlens is not None:
            b = h = 0
        span = slice(out.cu_seqlens[row], out.cu_seqlens[row] + out.lengths[row])
        kept = positions[span]
        to = np.arange(kept.size) + (sum(segments.valid(row)) - kept.size if layout.to_back else 0)
        filled[span] = sources(kept, to, layout.any_order)
        moved[layer][b, h, origin + to] = payload[layer][b, h, origin + filled[span]]
    return moved, filled


def same(what: str, got: np.ndarray, want: np.ndarray) -> None:
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or not np.array_equal(got, want):
        first = np.argwhere(got != want)[0] if got.shape == want.shape else ()
        raise AssertionError(f"{what} differ, first at {tuple(first)}: {got[tuple(first)]} for {want[tuple(first)]}")
