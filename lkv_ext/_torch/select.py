"""select: which rows are kept, without moving anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.options import whole_pages
from lkv_ext._torch import fake, vmap
from lkv_ext._torch.ints import Ints, Plan
from lkv_ext._torch.library import ops
from lkv_ext._torch.request import Arguments, Request, make_request
from lkv_ext.ragged import RaggedIndex


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
    page: int = 1,
) -> RaggedIndex:
    """The positions that `evict` would keep, without moving anything.

    Args:
        scores: `[B, H, L]` or, ragged, `[T]` with `cu_seqlens`; float32, float16 or bfloat16, any strides.
        budgets: as in `evict`.
        lengths: as in `evict`.
        starts: as in `evict`.
        cu_seqlens: as in `evict`.
        sink: as in `evict`.
        window: as in `evict`.
        layout: as in `evict`.
        capacity: as in `evict`.
        max_budget: as in `evict`.
        reserve: as in `evict`.
        align: as in `evict`.
        page: what is dropped of a segment is a multiple of so many rows, and what that keeps beyond the budget is the
            next best by score: the rows that `evict_` and `evict_paged_` keep with `to="back"` and pages of this size.

    Returns:
        `RaggedIndex`: positions, lengths, cu_seqlens, max_length, overflow. It has no gradient.

    Raises:
        ValueError, TypeError: as `evict`.
    """
    try:
        options = (sink, window, layout, capacity, max_budget, reserve, align, whole_pages(page))
        request = make_request(scores, cu_seqlens, budgets, lengths, starts, options)
        return new_index(ops.select([scores.detach()], *request.arguments), request)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("select", error, given=locals())


def new_index(result: Sequence[Tensor], request: Request) -> RaggedIndex:
    """From what select and evict_ return: positions, lengths, cu_seqlens and, where counted, overflow."""
    positions, lengths, cu_seqlens, *overflow = result
    return RaggedIndex(positions, lengths, cu_seqlens, request.max_length, overflow[0] if request.counted else None)


@torch.library.register_fake("lkv_ext::select")
def fake_select(scores: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    given = Arguments(*args, **kwargs)
    fake.check_arguments([], scores, given)
    return fake.index(scores, len(scores), given)


vmap.register("select")
