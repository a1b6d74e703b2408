"""Eviction in Triton, with a budget for every row: a radix select that gives ascending positions, then a gather.

A short row is one program that holds it in registers. A long one is shared by many: a launch for every digit of the
keys adds to the row's histogram, one more counts what each chunk keeps, and the last writes. On CPU tensors the kernels
run under TRITON_INTERPRET=1, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from inputs import Inputs
from shapes import Shape
from timing import Call
from torch import Tensor

SHORT = 16384  # keys of a row that one program holds
CHUNK = 4096
BINS = tl.constexpr(256)
ROUNDS = {torch.float32: 4, torch.float16: 3, torch.bfloat16: 2}  # bytes of a key that may differ
TILES = ((16, 4), (32, 4), (32, 8), (64, 8))  # rows of a program of the gather, its warps
_tiles: dict[Shape, tuple[int, int]] = {}  # the fastest, tried once for each shape


@triton.jit
def _load_keys(scores, columns, length):
    """Unsigned integers in the order of the scores: NaN below all, -0 equal to +0."""
    values = tl.load(scores + columns, mask=columns < length, other=0.0)
    if values.dtype == tl.bfloat16:  # as integers: no conversion may flush what is subnormal
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    else:
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    keys = tl.where((bits >= 0x80000000) & (size > 0), ~bits, bits | 0x80000000)
    return tl.where(size > 0x7F800000, 0, keys)


@triton.jit
def _digit(keys, ROUND: tl.constexpr):
    return ((keys >> (24 - 8 * ROUND)) & 255).to(tl.int32)


@triton.jit
def _round(digit, counts, kept, tied, wanted):
    """Keeps what lies above the bin where the count from above reaches `wanted`; what lies in that bin still ties."""
    bins = tl.arange(0, BINS)
    reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    picked = tl.sum((reached >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(bins > picked, counts, 0), 0)
    return kept | (tied & (digit > picked)), tied & (digit == picked), wanted - above


@triton.jit
def _narrow(keys, valid, histograms, wanted, ROUNDS: tl.constexpr):
    """What the first rounds say of these keys: which are kept, which still tie, and how many of the tie are kept."""
    kept, tied = tl.zeros(valid.shape, tl.int1), valid
    for r in tl.static_range(ROUNDS):
        counts = tl.load(histograms + r * BINS + tl.arange(0, BINS))
        kept, tied, wanted = _round(_digit(keys, r), counts, kept, tied, wanted)
    return kept, tied, wanted


@triton.jit
def _emit(positions, first, kept, tied, earlier_ties, wanted):
    """Writes `first` + the place of every kept key, in order; of a tie the lowest positions are kept."""
    rank = earlier_ties + tl.cumsum(tied.to(tl.int32), 0) - 1
    kept |= tied & (rank < wanted)
    slot = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(positions + slot, first + tl.arange(0, kept.shape[0]), mask=kept)


@triton.jit
def _select_short(scores, budgets, offsets, positions, length, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    tied = columns < length
    keys = _load_keys(scores + row * length, columns, length)
    kept, wanted = tl.zeros(tied.shape, tl.int1), tl.load(budgets + row)
    for r in tl.static_range(ROUNDS):
        digit = _digit(keys, r)
        kept, tied, wanted = _round(digit, tl.histogram(digit, BINS, mask=tied), kept, tied, wanted)
    _emit(positions + tl.load(offsets + row), row * length, kept, tied, 0, wanted)


@triton.jit
def _count_digits(scores, budgets, histograms, length, ROUND: tl.constexpr, ROUNDS: tl.constexpr, CHUNK: tl.constexpr):
    row, columns = tl.program_id(1), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    keys = _load_keys(scores + row * length, columns, length)
    histograms += row * ROUNDS * BINS
    _, tied, _ = _narrow(keys, columns < length, histograms, tl.load(budgets + row), ROUND)
    counts = tl.histogram(_digit(keys, ROUND), BINS, mask=tied)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histograms + ROUND * BINS + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _count_kept(scores, budgets, histograms, counts, length, ROUNDS: tl.constexpr, CHUNK: tl.constexpr):
    chunk, row = tl.program_id(0), tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = _load_keys(scores + row * length, columns, length)
    histograms += row * ROUNDS * BINS
    kept, tied, _ = _narrow(keys, columns < length, histograms, tl.load(budgets + row), ROUNDS)
    counts += 2 * (row * tl.num_programs(0) + chunk)
    tl.store(counts, tl.sum(kept.to(tl.int32), 0))
    tl.store(counts + 1, tl.sum(tied.to(tl.int32), 0))


@triton.jit
def _select_long(
    scores, budgets, offsets, histograms, counts, positions, length,
    ROUNDS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = _load_keys(scores + row * length, columns, length)
    histograms += row * ROUNDS * BINS
    kept, tied, wanted = _narrow(keys, columns < length, histograms, tl.load(budgets + row), ROUNDS)
    chunks = tl.arange(0, CHUNKS)
    counts += 2 * (row * tl.num_programs(0) + chunks)
    sure = tl.sum(tl.load(counts, mask=chunks < chunk, other=0), 0)
    ties = tl.sum(tl.load(counts + 1, mask=chunks < chunk, other=0), 0)
    begin = tl.load(offsets + row) + sure + tl.minimum(ties, wanted)
    _emit(positions + begin, row * length + chunk * CHUNK, kept, tied, ties, wanted)


@triton.jit
def _gather(k, v, positions, k_out, v_out, total, words, TILE: tl.constexpr, WORDS: tl.constexpr):
    """One tile of kept rows, of K and of V: both are on their way before either is stored."""
    to = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WORDS)
    source = tl.load(positions + to, mask=to < total, other=0).to(tl.int64) * words
    inside = (to < total)[:, None] & (column < words)[None, :]
    rows_k = tl.load(k + source[:, None] + column[None, :], mask=inside)
    rows_v = tl.load(v + source[:, None] + column[None, :], mask=inside)
    target = to.to(tl.int64)[:, None] * words + column[None, :]
    tl.store(k_out + target, rows_k, mask=inside)
    tl.store(v_out + target, rows_v, mask=inside)


def select(inputs: Inputs) -> Call:
    """A call that gives positions `row * L + position` of all rows, ascending, int32 `[T']`."""
    shape, scores = inputs.shape, inputs.scores.flatten(0, 1).contiguous()
    rows, length = scores.shape
    host = shape.per_segment
    budgets = torch.tensor(host, dtype=torch.int32, device=scores.device)
    offsets = (budgets.cumsum(0) - budgets).to(torch.int32)
    rounds = ROUNDS[scores.dtype]

    def short() -> Tensor:
        positions = budgets.new_empty(sum(host))
        block = triton.next_power_of_2(length)
        warps = max(1, min(32, block // 512))
        _select_short[(rows,)](scores, budgets, offsets, positions, length, rounds, block, num_warps=warps)
        return positions

    def long() -> Tensor:
        positions = budgets.new_empty(sum(host))
        grid = (triton.cdiv(length, CHUNK), rows)
        histograms = budgets.new_zeros(rows, rounds, BINS.value)
        counts = budgets.new_empty(rows, grid[0], 2)
        for r in range(rounds):
            _count_digits[grid](scores, budgets, histograms, length, r, rounds, CHUNK, num_warps=8)
        _count_kept[grid](scores, budgets, histograms, counts, length, rounds, CHUNK, num_warps=8)
        chunks = triton.next_power_of_2(grid[0])
        arguments = (scores, budgets, offsets, histograms, counts, positions, length)
        _select_long[grid](*arguments, rounds, CHUNK, chunks, num_warps=8)
        return positions

    return short if length <= SHORT else long


def gather(inputs: Inputs, positions: Tensor, tile: int, warps: int) -> list[Tensor]:
    """Rows of K and V by positions `row * L + position`, `[T', D]`, moved as words of four bytes."""
    shape, total = inputs.shape, positions.numel()
    if shape.row_bytes % 4:
        raise ValueError(f"expected rows of whole words, got {shape.row_bytes} bytes")
    words = shape.row_bytes // 4
    payload = [t.view(torch.int32) for t in inputs.payload]
    out = [t.new_empty(total, words) for t in payload]
    block = triton.next_power_of_2(words)
    _gather[(triton.cdiv(total, tile),)](*payload, positions, *out, total, words, tile, block, num_warps=warps)
    return [t.view(shape.dtype) for t in out]


def evict(inputs: Inputs) -> Call:
    """`select`, then `gather` with the best of a few tiles."""
    find = select(inputs)
    if inputs.k.is_cuda and inputs.shape not in _tiles:
        positions, time = find(), triton.testing.do_bench
        _tiles[inputs.shape] = min(TILES, key=lambda tile: time(lambda: gather(inputs, positions, *tile)))
    tile = _tiles.get(inputs.shape, TILES[1])
    return lambda: gather(inputs, find(), *tile)
