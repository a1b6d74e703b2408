"""select and gather: the two halves of evict."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lkv_ext.ops import derivatives, errors
from lkv_ext.ops.arguments import Request, request
from lkv_ext.ops.ints import Ints, Plan
from lkv_ext.ops.library import ops
from lkv_ext.ops.ragged import RaggedIndex


def select(
    scores: Tensor,
    budgets: Ints | Plan,
    *,
    lengths: Ints | None = None,
    starts: Ints | None = None,
    cu_seqlens: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    layout: str = "packed",
    capacity: int | None = None,
    max_budget: int | None = None,
    reserve: int = 0,
    align: int = 1,
) -> RaggedIndex:
    """The positions that `evict` would keep, without moving anything.

    Args:
        scores: `[B, H, L]` or, ragged, `[T]` with `cu_seqlens`; float32, float16 or bfloat16, any strides.

    All else is as in `evict`. No gradients: a selection has none.

    Returns:
        `RaggedIndex`: positions, lengths, cu_seqlens, max_length, overflow.

    Raises:
        ValueError, TypeError: as `evict`.
    """
    try:
        options = (sink, window, layout, capacity, max_budget, reserve, align)
        asked = request(scores, cu_seqlens, budgets, lengths, starts, options)
        return new_index(ops.select([scores.detach()], *asked.arguments), asked)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("select", error, given=locals())


def gather(tensors: Sequence[Tensor], index: RaggedIndex, *, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    """Moves the rows that an index names.

    Args:
        tensors: dense `[B, H, L, ...]` or, with `cu_seqlens`, ragged `[T, ...]`; any dtypes, contiguous after the token
            axis, one L for all.
        index: what `select` returned for scores of these row sets. Its values are not trusted: a position outside
            the row set gives a row of zeros.
        cu_seqlens: int32 `[B * H + 1]` of ragged input.

    Returns:
        One tensor for each: `[T', ...]` or, with a padded index, `[B, H, C, ...]`. Differentiable, in either mode.

    Raises:
        ValueError, TypeError: for a wrong shape, device or dtype.
    """
    try:
        moved = list(tensors)
        if not moved:
            return []
        if cu_seqlens is None:
            return derivatives.gather(moved, index.positions, index.cu_seqlens)
        heads = index.lengths.shape[-1]
        batch = index.lengths.numel() // max(heads, 1)
        return derivatives.gather(moved, index.positions, index.cu_seqlens, cu_seqlens, batch, heads)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("gather", error, [f"tensors[{i}]" for i in range(1000)], given=locals())


def new_index(result: Sequence[Tensor], asked: Request) -> RaggedIndex:
    """From what select and evict_ return: positions, lengths, cu_seqlens and, where counted, overflow."""
    return RaggedIndex(*result[:3], asked.max_length, result[3] if asked.counted else None)
