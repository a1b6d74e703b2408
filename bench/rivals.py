"""What a PyTorch user writes today, from the obvious to the best, and the memcpy that bounds everybody.

Each function takes the inputs and returns a call without arguments that does the work of one eviction. The `_out`
variants write into memory that they own, as `evict(out=...)` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from shapes import Inputs, Shape
from timing import Call
from torch import Tensor


def clone(tensors: list[Tensor]) -> Call:
    """A memcpy of the output's bytes into fresh memory."""
    return lambda: [t.clone() for t in tensors]


def copy_warm(tensors: list[Tensor]) -> Call:
    """A memcpy of the output's bytes into memory that is there already."""
    targets = [t.clone() for t in tensors]
    return lambda: [target.copy_(source) for target, source in zip(targets, tensors, strict=True)]


def naive(inputs: Inputs) -> Call:
    """topk, sort, gather along the token axis of the 4-D cache: what the papers' code does."""
    budget = inputs.shape.budgets

    def call() -> list[Tensor]:
        index = inputs.scores.topk(budget, dim=-1).indices.sort(dim=-1).values
        index = index[..., None].expand(-1, -1, -1, inputs.shape.dim)
        return [t.gather(2, index) for t in inputs.payload]

    return call


def best(inputs: Inputs) -> Call:
    """topk(sorted=False), sort the positions, one index_select over the flattened rows."""
    flat = _flat(inputs)
    budget = inputs.shape.budgets
    return lambda: _best(*flat, budget)


def best_by_mask(inputs: Inputs) -> Call:
    """`best` with the positions put in order by a mask and nonzero instead of a sort."""
    rows, scores, _ = _flat(inputs)
    budget, total = inputs.shape.budgets, inputs.shape.kept

    def call() -> list[Tensor]:
        picked = scores.topk(budget, dim=-1, sorted=False).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, picked, True).view(-1)
        # On CUDA nonzero waits for the device to learn how many there are.
        index = mask.nonzero_static(size=total) if mask.is_cuda else mask.nonzero()
        return [t.index_select(0, index.view(-1)) for t in rows]

    return call


def compiled(inputs: Inputs) -> Call:
    """`best` under torch.compile."""
    flat, budget = _flat(inputs), inputs.shape.budgets
    fast = _compile(_best, inputs.shape)
    return lambda: fast(*flat, budget)


def best_out(inputs: Inputs) -> Call:
    """`best` with every intermediate and the result in memory that is there already."""
    rows, scores, base = _flat(inputs)
    budget = inputs.shape.budgets
    values, index = scores.topk(budget, dim=-1, sorted=False)
    ascending, order = index.sort(dim=-1)
    outputs = [t.index_select(0, ascending.view(-1)) for t in rows]

    def call() -> list[Tensor]:
        torch.topk(scores, budget, dim=-1, sorted=False, out=(values, index))
        torch.sort(index, dim=-1, out=(ascending, order))
        flat = ascending.add_(base).view(-1)
        return [torch.index_select(t, 0, flat, out=out) for t, out in zip(rows, outputs, strict=True)]

    return call


def loop(inputs: Inputs) -> Call:
    """Ragged budgets head by head: topk, sort, index, and a cat in the end."""
    budgets = inputs.shape.per_row
    k, v = (t.flatten(0, 1) for t in inputs.payload)
    scores = inputs.scores.flatten(0, 1)

    def call() -> list[Tensor]:
        ks, vs = [], []
        for row, budget in enumerate(budgets):
            index = scores[row].topk(budget).indices.sort().values
            ks.append(k[row][index])
            vs.append(v[row][index])
        return [torch.cat(ks), torch.cat(vs)]

    return call


def best_ragged(inputs: Inputs) -> Call:
    """Ragged budgets with only the selection head by head, then one index_select for all rows."""
    rows, scores, _ = _flat(inputs)
    budgets = inputs.shape.per_row
    return lambda: _best_ragged(rows, scores, budgets)


def best_batched(inputs: Inputs) -> Call:
    """Ragged budgets without a loop: topk for the largest of them, of which every row keeps as many as it may."""
    rows, scores, _ = _flat(inputs)
    most, total, budgets = max(inputs.shape.per_row), inputs.shape.kept, _budget_column(inputs)
    return lambda: _best_of_ranked(rows, scores, scores.topk(most, dim=-1).indices, budgets, total)


def compiled_ragged(inputs: Inputs) -> Call:
    """`best_ragged` under torch.compile."""
    rows, scores, _ = _flat(inputs)
    budgets = inputs.shape.per_row
    fast = _compile(_best_ragged, inputs.shape)
    return lambda: fast(rows, scores, budgets)


def best_in_place(inputs: Inputs) -> Call:
    """`best`, then a copy to the front of every head's buffer."""
    call = best(inputs)
    budget = inputs.shape.budgets
    fronts = [t[:, :, :budget] for t in inputs.payload]
    return lambda: [front.copy_(t.view(front.shape)) for front, t in zip(fronts, call(), strict=True)]


def topk(inputs: Inputs) -> Call:
    return lambda: inputs.scores.topk(inputs.shape.budgets, dim=-1)


def topk_unsorted(inputs: Inputs) -> Call:
    return lambda: inputs.scores.topk(inputs.shape.budgets, dim=-1, sorted=False)


def topk_positions(inputs: Inputs) -> Call:
    """What `select` returns: the positions in ascending order."""
    return lambda: inputs.scores.topk(inputs.shape.budgets, dim=-1, sorted=False).indices.sort(dim=-1).values


def topk_loop(inputs: Inputs) -> Call:
    """The positions of ragged budgets, head by head."""
    budgets, scores = inputs.shape.per_row, inputs.scores.flatten(0, 1)
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


def flashinfer(inputs: Inputs) -> Call:
    """FlashInfer's top_k in place of torch's; ImportError where it is not installed."""
    rows, *_ = _flat(inputs)
    find = flashinfer_positions(inputs)

    def call() -> list[Tensor]:
        index = find()
        return [t.index_select(0, index) for t in rows]

    return call


def flashinfer_positions(inputs: Inputs) -> Callable[[], Tensor]:
    """Positions in the flattened rows, ascending, from FlashInfer's top_k."""
    from flashinfer import top_k

    _, scores, base = _flat(inputs)
    budget = inputs.shape.budgets
    return lambda: top_k(scores, budget, sorted=False)[1].sort(dim=-1).values.add_(base).view(-1)


def flashinfer_ragged(inputs: Inputs) -> Call:
    """`best_batched` with FlashInfer's top_k, which has one k for all rows as well."""
    from flashinfer import top_k

    rows, scores, _ = _flat(inputs)
    most, total, budgets = max(inputs.shape.per_row), inputs.shape.kept, _budget_column(inputs)
    return lambda: _best_of_ranked(rows, scores, top_k(scores, most, sorted=True)[1], budgets, total)


def _best(rows: list[Tensor], scores: Tensor, base: Tensor, budget: int) -> list[Tensor]:
    index = scores.topk(budget, dim=-1, sorted=False).indices.sort(dim=-1).values
    index = index.add_(base).view(-1)
    return [t.index_select(0, index) for t in rows]


def _best_ragged(rows: list[Tensor], scores: Tensor, budgets: list[int]) -> list[Tensor]:
    length = scores.shape[1]
    picked = [
        scores[row].topk(budget, sorted=False).indices.sort().values.add_(row * length)
        for row, budget in enumerate(budgets)
    ]
    index = torch.cat(picked)
    return [t.index_select(0, index) for t in rows]


def _best_of_ranked(rows: list[Tensor], scores: Tensor, ranked: Tensor, budgets: Tensor, total: int) -> list[Tensor]:
    """The first `budgets` `[rows, 1]` of each row of `ranked`, in ascending position; `total` in all."""
    keep = torch.arange(ranked.shape[1], device=ranked.device) < budgets
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ranked, keep)
    index = mask.view(-1).nonzero_static(size=total).view(-1)
    return [t.index_select(0, index) for t in rows]


@lru_cache(maxsize=1)
def _compile(composition: Callable[..., list[Tensor]], shape: Shape) -> Callable[..., list[Tensor]]:
    # All shapes go through one code object: without the reset the ninth would silently run uncompiled.
    torch.compiler.reset()
    return torch.compile(composition, dynamic=False)


def _flat(inputs: Inputs) -> tuple[list[Tensor], Tensor, Tensor]:
    """The cache as rows `[B * H * L, D]`, the scores as `[B * H, L]`, and where each row set begins."""
    scores = inputs.scores.flatten(0, 1)
    base = torch.arange(scores.shape[0], device=scores.device)[:, None] * inputs.shape.length
    return [t.flatten(0, 2) for t in inputs.payload], scores, base


def _budget_column(inputs: Inputs) -> Tensor:
    return torch.tensor(inputs.shape.per_row, device=inputs.scores.device)[:, None]
