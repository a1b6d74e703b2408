"""What a PyTorch user writes today, from the obvious to the best, and the memcpy that bounds everybody.

Each function takes the inputs and returns a call without arguments that does the work of one eviction. Most are a way
to find positions in the flattened rows, ascending, and one index_select. `best_out` writes into memory that it owns, as
`evict(out=...)` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from inputs import Inputs
from shapes import Shape
from timing import Call
from torch import Tensor

Rows = list[Tensor]
Find = Callable[[Tensor, Tensor, list[int]], Tensor]  # (scores [rows, L], base [rows, 1], budgets) -> positions


def clone(tensors: Rows) -> Call:
    """A memcpy of the output's bytes into fresh memory."""
    return lambda: [t.clone() for t in tensors]


def copy_warm(tensors: Rows) -> Call:
    """A memcpy of the output's bytes into memory that is there already."""
    targets = [t.clone() for t in tensors]
    return lambda: [target.copy_(source) for target, source in zip(targets, tensors, strict=True)]


def naive(inputs: Inputs) -> Call:
    """topk, sort, gather along the token axis of the 4-D cache: what the papers' code does."""
    budget, dim = inputs.shape.budgets, inputs.shape.dim

    def call() -> Rows:
        index = inputs.scores.topk(budget, dim=-1).indices.sort(dim=-1).values
        index = index[..., None].expand(-1, -1, -1, dim)
        return [t.gather(2, index) for t in inputs.payload]

    return call


def by_sort(scores: Tensor, base: Tensor, budgets: list[int]) -> Tensor:
    """topk(sorted=False), then the positions sorted."""
    return scores.topk(budgets[0], dim=-1, sorted=False).indices.sort(dim=-1).values.add_(base).view(-1)


def by_mask(scores: Tensor, base: Tensor, budgets: list[int]) -> Tensor:
    """The positions put in order by a mask and nonzero instead of a sort."""
    picked = scores.topk(budgets[0], dim=-1, sorted=False).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, picked, True).view(-1)
    # On CUDA nonzero waits for the device to learn how many there are.
    return (mask.nonzero_static(size=sum(budgets)) if mask.is_cuda else mask.nonzero()).view(-1)


def by_loop(scores: Tensor, base: Tensor, budgets: list[int]) -> Tensor:
    """Ragged budgets, only the selection head by head."""
    picked = [
        scores[row].topk(budget, sorted=False).indices.sort().values.add_(row * scores.shape[1])
        for row, budget in enumerate(budgets)
    ]
    return torch.cat(picked)


def _find_and_move(rows: Rows, scores: Tensor, base: Tensor, budgets: list[int], find: Find) -> Rows:
    index = find(scores, base, budgets)
    return [t.index_select(0, index) for t in rows]


@lru_cache(maxsize=1)
def _compiled(shape: Shape) -> Callable[..., Rows]:
    # All shapes go through one code object: without the reset the ninth would silently run uncompiled.
    torch.compiler.reset()
    return torch.compile(_find_and_move, dynamic=False)


def _composed(find: Find, compiles: bool = False) -> Callable[[Inputs], Call]:
    """`find`, then one index_select over the flattened rows."""

    def make(inputs: Inputs) -> Call:
        flat, budgets = _flat(inputs), inputs.shape.per_segment
        call = _compiled(inputs.shape) if compiles else _find_and_move
        return lambda: call(*flat, budgets, find)

    return make


best, best_by_mask, best_ragged = _composed(by_sort), _composed(by_mask), _composed(by_loop)
compiled, compiled_ragged = _composed(by_sort, compiles=True), _composed(by_loop, compiles=True)


def _by_largest(inputs: Inputs, topk: Callable[[Tensor, int], Tensor]) -> Call:
    """Ragged budgets without a loop: topk for the largest of them, of which every row keeps as many as it may."""
    rows, scores, _ = _flat(inputs)
    most, total = max(inputs.shape.per_segment), inputs.shape.kept
    budgets = torch.tensor(inputs.shape.per_segment, device=scores.device)[:, None]

    def call() -> Rows:
        ranked = topk(scores, most)
        keep = torch.arange(most, device=scores.device) < budgets
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ranked, keep)
        index = mask.view(-1).nonzero_static(size=total).view(-1)
        return [t.index_select(0, index) for t in rows]

    return call


def best_batched(inputs: Inputs) -> Call:
    return _by_largest(inputs, lambda scores, most: scores.topk(most, dim=-1).indices)


def flashinfer_ragged(inputs: Inputs) -> Call:
    """FlashInfer's top_k has one k for all rows as well."""
    from flashinfer import top_k

    return _by_largest(inputs, lambda scores, most: top_k(scores, most, sorted=True)[1])


def flashinfer_positions(inputs: Inputs) -> Callable[[], Tensor]:
    """FlashInfer's top_k in place of torch's; ImportError where it is not installed."""
    from flashinfer import top_k

    _, scores, base = _flat(inputs)
    budget = inputs.shape.budgets
    return lambda: top_k(scores, budget, sorted=False)[1].sort(dim=-1).values.add_(base).view(-1)


def flashinfer(inputs: Inputs) -> Call:
    flat, find = _flat(inputs), flashinfer_positions(inputs)
    return lambda: _find_and_move(*flat, [], lambda *_: find())


def best_out(inputs: Inputs) -> Call:
    """`best` with every intermediate and the result in memory that is there already."""
    rows, scores, base = _flat(inputs)
    budget = inputs.shape.budgets
    values, index = scores.topk(budget, dim=-1, sorted=False)
    ascending, order = index.sort(dim=-1)
    outputs = [t.index_select(0, ascending.view(-1)) for t in rows]

    def call() -> Rows:
        torch.topk(scores, budget, dim=-1, sorted=False, out=(values, index))
        torch.sort(index, dim=-1, out=(ascending, order))
        flat = ascending.add_(base).view(-1)
        return [torch.index_select(t, 0, flat, out=out) for t, out in zip(rows, outputs, strict=True)]

    return call


def best_in_place(inputs: Inputs) -> Call:
    """`best`, then a copy to the front of every head's buffer."""
    call = best(inputs)
    fronts = [t[:, :, : inputs.shape.budgets] for t in inputs.payload]
    return lambda: [front.copy_(t.view(front.shape)) for front, t in zip(fronts, call(), strict=True)]


def head_by_head_in_place(inputs: Inputs) -> Call:
    """One head after the other: topk, sort, and a copy of its rows to the front of its own buffer."""
    budgets = inputs.shape.per_segment
    k, v, scores = (t.flatten(0, 1) for t in (*inputs.payload, inputs.scores))

    def call() -> None:
        for row, budget in enumerate(budgets):
            kept = scores[row].topk(budget, sorted=False).indices.sort().values
            for rows in (k, v):
                rows[row, :budget] = rows[row].index_select(0, kept)

    return call


def loop(inputs: Inputs) -> Call:
    """Ragged budgets head by head: topk, sort, index, and a cat in the end."""
    budgets = inputs.shape.per_segment
    k, v, scores = (t.flatten(0, 1) for t in (*inputs.payload, inputs.scores))

    def call() -> Rows:
        index = [scores[row].topk(budget).indices.sort().values for row, budget in enumerate(budgets)]
        return [torch.cat([t[row][kept] for row, kept in enumerate(index)]) for t in (k, v)]

    return call


def topk_loop(inputs: Inputs) -> Call:
    """The positions of ragged budgets, head by head."""
    budgets, scores = inputs.shape.per_segment, inputs.scores.flatten(0, 1)
    return lambda: torch.cat(
        [row.topk(n, sorted=False).indices.sort().values for row, n in zip(scores, budgets, strict=True)]
    )


def gather_4d(inputs: Inputs, positions: Tensor) -> Call:
    """torch.gather with the positions `[B, H, n]` broadcast over the row."""
    index = positions.long()[..., None].expand(-1, -1, -1, inputs.shape.dim)
    return lambda: [t.gather(2, index) for t in inputs.payload]


def gather_rows(inputs: Inputs, positions: Tensor) -> Call:
    """index_select over the flattened rows."""
    rows, _, base = _flat(inputs)
    index = (positions.long().flatten(0, 1) + base).view(-1)
    return lambda: [t.index_select(0, index) for t in rows]


def _flat(inputs: Inputs) -> tuple[Rows, Tensor, Tensor]:
    """The cache as rows `[B * H * L, D]`, the scores as `[B * H, L]`, and where each segment begins."""
    scores = inputs.scores.flatten(0, 1)
    base = torch.arange(scores.shape[0], device=scores.device)[:, None] * inputs.shape.length
    return [t.flatten(0, 2) for t in inputs.payload], scores, base
