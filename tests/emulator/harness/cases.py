"""Random cases for the launchers: hostile values, odd sizes, odd strides. A seed means the same case everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.oracle import Layout, Segments, spans

ROW_BYTES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 48, 64, 80, 256)
ALIGNED_ROW_BYTES = (16, 48, 80, 256, 1024)
MOST_SEGMENTS = 20  # the case of more segments than fit into a table of shared memory: it takes seconds
SCORES = ("normal", "ties", "constant", "minus_infinity", "hostile", "tiny", "ascending", "descending", "one_bin")


@dataclass
class Placed:
    """One tensor of one layer: logical bytes [batch, heads, tokens, row_bytes] and how they lie in memory."""

    data: np.ndarray
    tokens_first: bool  # [batch, tokens, heads, row_bytes], as a transposed view comes in
    gap: int  # bytes between the rows
    lead: int  # bytes before the first row: what alignment is left

    def strides(self) -> tuple[int, int, int]:
        _batch, heads, tokens, size = self.data.shape
        pitch = size + self.gap
        if self.tokens_first:
            return tokens * heads * pitch, pitch, heads * pitch
        return heads * tokens * pitch, tokens * pitch, pitch

    def extent(self) -> int:
        """Bytes of memory, up to the last byte of the last row and no further."""
        if self.data.size == 0:
            return self.lead
        last = sum((n - 1) * s for n, s in zip(self.data.shape, self.strides(), strict=False))
        return self.lead + last + self.data.shape[-1]

    def view(self, memory: np.ndarray) -> np.ndarray:
        memory = memory[self.lead :] if self.data.size else memory
        return np.lib.stride_tricks.as_strided(memory, self.data.shape, (*self.strides(), 1))


@dataclass
class Case:
    segments: Segments
    layout: Layout
    sink: int
    window: int
    score_type: int  # ScoreType: f32, f16, bf16
    scores: list[Placed]  # per layer
    score_values: list[np.ndarray]
    payloads: list[list[Placed]]  # [payload][layer]
    wide: bool
    block: int
    cluster: int
    splits: int
    resident_keys: int
    registers: int
    shared_tables: bool
    behind_select: bool
    by_upload: bool


def score_values(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    if kind == "normal":
        values = rng.standard_normal(count)
    elif kind == "ties":
        values = rng.integers(0, 8, count) / 8
    elif kind == "constant":
        values = np.full(count, -0.25)
    elif kind == "minus_infinity":
        values = np.full(count, -np.inf)
    elif kind == "hostile":
        values = rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7], count)
    elif kind == "tiny":
        values = rng.exponential(1.0 / max(count, 1), count)
    elif kind == "one_bin":
        values = 1 + rng.integers(0, 40, count) * 2.0**-20
    else:
        values = np.sort(rng.standard_normal(count)) * (1 if kind == "ascending" else -1)
    return values.astype(np.float32).reshape(shape)


def encode(values: np.ndarray, score_type: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes [..., size], the values they stand for)."""
    if score_type == 1:
        stored = values.astype(np.float16)
        seen = stored
    elif score_type == 2:
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        seen = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = seen = values
    return np.ascontiguousarray(stored)[..., None].view(np.uint8), seen


def per_row(rng: np.random.Generator, full: tuple[int, int, int], low: int, high: int, wide: bool) -> np.ndarray:
    """Integers that broadcast to `full`; some far out of range, some the same for a whole axis."""
    shape = tuple(n if rng.random() < 0.7 else 1 for n in full)
    values = rng.integers(low, high + 1, shape)
    wild = rng.random(shape)
    values[wild < 0.05] = -(2**63) if wide else -3
    values[wild > 0.95] = 2**63 - 1 if wide else 2**31 - 1
    return values


def make_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    # Most cases run small blocks; those of production size get few segments, and some cases more segments than threads.
    kind_of_size = one_of("small", "small", "small", "small", "small", "small", "production", "crowd")
    ragged = rng.random() < 0.3
    layers = 1 if ragged else int(rng.integers(1, 4))
    batch, heads = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    longest = one_of(0, 1, 5, 31, 130, 130, 257, 600, 600, 1500)
    if kind_of_size == "production":
        layers, batch, longest = 1, 1, one_of(31, 600, 5000)
    elif kind_of_size == "crowd":
        layers, batch, heads, longest = 1, int(rng.integers(1, 6)), int(rng.integers(30, 50)), one_of(1, 5, 31)
        if seed == MOST_SEGMENTS:
            batch, heads, longest = 2, 513, 5
    full = (layers, batch, heads)
    rows = layers * batch * heads
    if ragged:
        cu_seqlens = np.concatenate([[0], np.cumsum(rng.integers(0, longest + 1, rows))]).astype(np.int32)
        tokens = [int(cu_seqlens[-1])]
    else:
        cu_seqlens, tokens = None, [int(rng.integers(longest // 2, longest + 1)) for _ in range(layers)]
    wide = rng.random() < 0.5
    starts, lengths = np.zeros((1, 1, 1), np.int64), np.full((1, 1, 1), longest)
    if not ragged and rng.random() < 0.5:
        starts = per_row(rng, full, 0, longest // 4, wide)
    if rng.random() < 0.5:
        lengths = per_row(rng, full, 0, longest, wide)
    budgets = per_row(rng, full, 0, max(1, int(longest * one_of(0.1, 0.5, 1.1))), wide)
    segments = Segments(layers, batch, heads, tokens, lengths, starts, budgets, cu_seqlens)

    layout = Layout(max_budget=one_of(-1, -1, longest // 3), reserve=one_of(0, 0, 3, 17),
                    align=one_of(1, 1, 4, 16), padded=-1, total=2**31 - 1)  # fmt: skip
    if rng.random() < 0.25:
        layout.padded = one_of(1, longest // 2 + 1, longest + 5)
        layout.reserve, layout.align = 0, 1
        layout.total = rows * layout.padded
    else:
        used = int(spans(segments, layout).cu_seqlens[-1])
        layout.total = one_of(used, used, used + int(rng.integers(0, 200)), used * 2 // 3)

    shapes = [(1, 1, n) if ragged else (batch, heads, n) for n in tokens]
    score_type = int(rng.integers(3))
    kind = one_of(*SCORES)
    element = 4 if score_type == 0 else 2
    coded = [encode(score_values(rng, kind, shape), score_type) for shape in shapes]
    transposed, gap = rng.random() < 0.3, element * one_of(0, 0, 1, 3)
    scores = [Placed(data, transposed, gap, element * one_of(0, 1)) for data, _ in coded]
    payloads = []
    aligned = rng.random() < 0.4
    for _ in range(one_of(1, 2, 2, 3, 5)):
        size, transposed = one_of(*(ALIGNED_ROW_BYTES if aligned else (0, *ROW_BYTES))), rng.random() < 0.5
        gap, lead = (one_of(0, 16), 0) if aligned else (one_of(0, 0, size, 1, 4), one_of(0, 0, 0, 2, 8))
        payloads.append(
            [Placed(rng.integers(1, 256, (*s, size), dtype=np.uint8), transposed, gap, lead) for s in shapes]
        )
    case = Case(segments, layout, one_of(0, 0, 1, 4, 300), one_of(0, 0, 1, 7, 300), score_type, scores,
                [seen for _, seen in coded], payloads, wide,
                block=0 if kind_of_size == "production" else 64,
                cluster=1 if kind_of_size == "crowd" else one_of(0, 1, 2, 4, 8, 16),
                splits=one_of(-1, -1, -1, 0, 1, 3), resident_keys=one_of(-1, -1, 0, 256),
                behind_select=rng.random() < 0.7, by_upload=rng.random() < 0.3,
                registers=one_of(-1, -1, 0), shared_tables=rng.random() < 0.7)  # fmt: skip
    layout.to_back = rng.random() < 0.5
    if layout.to_back:
        layout.page = one_of(1, 1, 4, 7, 64)
    layout.any_order = rng.random() < 0.3
    return case
