"""evict, evict_layers and evict_: keep the best rows of every head, each its own number, and move them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.options import Options, any_order_of, back_of
from lkv_ext._common.sizes import Segments
from lkv_ext._torch import derivatives, fake, vmap
from lkv_ext._torch.gather import gather_rows
from lkv_ext._torch.ints import Ints, Plan
from lkv_ext._torch.library import ops
from lkv_ext._torch.request import Arguments, Request, make_request, request_for
from lkv_ext._torch.select import new_index
from lkv_ext.ragged import RaggedIndex, RaggedKV


def evict(
    k: Tensor,
    v: Tensor | None,
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
    companions: Sequence[Tensor] = (),
    out: RaggedKV | None = None,
) -> RaggedKV:
    """Keeps the `budgets` best rows of every (sequence, KV head) and moves their K and V together.

    In each segment, with `n = clamp(budget, 0, length)`, the first `min(sink, n)` and last `min(window, rest)` valid
    tokens are kept, and of those between the best by score, ties to the lower position; NaN ranks below -inf, -0 equals
    +0. Kept rows come out in ascending position, bitwise equal to their sources. The result of a segment depends on
    nothing else: not on its neighbours, strides, threads, the device or the run.

    Args:
        k: dense `[B, H, L, D]`, any strides with contiguous rows (a transposed `[B, L, H, D]` is not copied); or ragged
            `[T, D]` with `cu_seqlens`. Any dtype: rows move as bytes. H counts KV heads.
        v: `[B, H, L, Dv]` or `[T, Dv]`, as `k`; None for caches of one tensor.
        scores: `[B, H, L]` or, ragged, `[T]`, float32, float16 or bfloat16, any strides; higher is kept.
        budgets: rows to keep per head: an int, a sequence or an integer tensor `[H]` or `[B, H]`, on the host or on the
            device, or a `plan`.
        lengths: valid rows of each segment, `[B]` or `[B, H]`, host or device; of ragged input the rows in use of each
            span. Default: all.
        starts: where the valid range `[starts, starts + lengths)` of a dense segment begins, `[B]` or `[B, H]`, host or
            device, so that padding may lie on either side. Default: 0.
        cu_seqlens: int32 `[B * H + 1]` of ragged input: where the span of each segment begins. The result of an earlier
            `evict` is such input.
        sink: the first `sink` valid tokens are kept before any other, inside the budget.
        window: the last `window` valid tokens are kept before any but those of `sink`, inside the budget.
        layout: "packed", rows of all heads after each other in (b, h) order, `[T', D]`; or "padded", `[B, H, C, D]`.
        capacity: upper bound of T' (packed) or C (padded). With budgets in a device tensor it is the size; without
            it and without `max_budget` such a call synchronises once to read them, and raises ValueError under
            torch.compile or CUDA-graph capture. Heads that do not fit are cut, see `overflow`.
        max_budget: upper bound for any one head.
        reserve: slack rows behind every head's rows, so that later tokens append in place.
        align: every span is its rows plus `reserve`, rounded up to `align`. With the page size the buffers are paged
            pools by view, see `RaggedKV.block_table`.
        companions: tensors `[B, H, L, ...]` (ragged `[T, ...]`) of any dtype that move by the same positions.
        out: the result of an earlier call of the same sizes: its memory is overwritten and it is returned again.

    Returns:
        The kept rows as `RaggedKV`. Slack rows are zero, in `positions` -1.

    Raises:
        ValueError, TypeError: for a wrong shape, device, dtype, stride or overlap, before anything is written.

    Gradients and tangents flow through k, v and companions where these require them; the call is then `select` and
    `gather`. `out` must require none. CPU tensors count as host values, except under torch.compile, which cannot read
    them.
    """
    options = (sink, window, layout, capacity, max_budget, reserve, align)
    try:
        payload = [k, *companions] if v is None else [k, v, *companions]
        _check_rank(k, v, 4 if cu_seqlens is None else 2)
        request = make_request(k, cu_seqlens, budgets, lengths, starts, options)
        if derivatives.wanted((scores, *payload)):
            if derivatives.wanted(payload):
                return _select_and_gather(payload, v is not None, scores, cu_seqlens, request, out)
            scores = scores.detach()  # they rank, and a ranking has no gradient
        return _evict(payload, v is not None, [scores], request, out)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("evict", error, _names("k", "v", v, companions), given=locals())


def evict_layers(
    ks: Sequence[Tensor],
    vs: Sequence[Tensor] | None,
    scores: Sequence[Tensor] | Tensor,
    budgets: Ints | Plan,
    *,
    lengths: Ints | None = None,
    starts: Ints | None = None,
    sink: int = 0,
    window: int = 0,
    layout: str = "packed",
    capacity: int | None = None,
    max_budget: int | None = None,
    reserve: int = 0,
    align: int = 1,
    companions: Sequence[Sequence[Tensor]] = (),
    out: RaggedKV | None = None,
) -> RaggedKV:
    """`evict` for all layers of a model at once: one call, one joint buffer.

    Args:
        ks: one dense tensor `[B, H, L, D]` per layer; L and the strides may differ.
        vs: one dense tensor `[B, H, L, Dv]` per layer, or None.
        scores: one tensor `[B, H, L]` per layer, or `[N, B, H, L]`.
        budgets: an int, `[N, H]` or `[N, B, H]`.
        lengths: `[B]`, `[B, H]` or `[N, B, H]`.
        starts: `[B]`, `[B, H]` or `[N, B, H]`.
        sink: as in `evict`.
        window: as in `evict`.
        layout: as in `evict`.
        capacity: upper bound of T' or C of the joint output.
        max_budget: as in `evict`.
        reserve: as in `evict`.
        align: as in `evict`.
        companions: for every companion one tensor `[B, H, L, ...]` per layer.
        out: as in `evict`.

    Returns:
        `RaggedKV` of all layers, segments in (layer, b, h) order, `lengths` `[N, B, H]`; `out.layer(i)` is a view.

    Raises:
        ValueError, TypeError: as `evict`. No gradients: raises where a tensor requires one.
    """
    options = Options(sink, window, layout, capacity, max_budget, reserve, align)
    try:
        moved = [ks, *companions] if vs is None else [ks, vs, *companions]
        if isinstance(scores, Tensor) and scores.dim() != 4:
            raise ValueError(f"expected scores of shape [N, B, H, L] or one tensor per layer, got {list(scores.shape)}")
        if len(ks) == 0:
            raise ValueError("expected at least one layer in ks, got none")
        if any(len(part) != len(ks) for part in (*moved, scores)):
            lists = "ks, vs, companions and scores" if vs is not None else "ks, companions and scores"
            counts = [len(part) for part in (*moved, scores)]
            raise ValueError(f"expected one tensor per layer in every list, got {counts} in {lists}")
        payload = [t for part in moved for t in part]
        for k, v in zip(ks, [None] * len(ks) if vs is None else vs, strict=True):
            _check_rank(k, v, 4)
        derivatives.refuse(payload, "use evict per layer")
        layers, (batch, heads) = len(ks), ks[0].shape[:2]
        tokens = [k.shape[2] for k in ks]
        if all(count == tokens[0] for count in tokens):
            limits = tokens[:1]
        else:
            limits = [count for count in tokens for _ in range(batch * heads)]
        request = request_for(
            Segments(layers, batch, heads, limits, stacked=True), None, budgets, lengths, starts, options
        )
        if layers == 1 and out is not None:
            _evict(payload, vs is not None, [s.detach() for s in scores], request, out.layer(0))
            out.max_length, out.reserve, out.align = request.max_length, reserve, align
            return out
        result = _evict(payload, vs is not None, [s.detach() for s in scores], request, out)
        if layers == 1:  # the ops know no layer axis for one layer
            result.lengths = result.lengths[None]
            if layout == "padded":
                result.k, result.positions = result.k[None], result.positions[None]
                result.v = None if result.v is None else result.v[None]
                result.companions = tuple(c[None] for c in result.companions)
        return result
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        every = range(len(ks)) if isinstance(ks, Sequence) else ()
        names = [f"{name}[{layer}]" for name in _names("ks", "vs", vs, companions) for layer in every]
        errors.reraise("evict_layers", error, names, _names("k", "v", vs, companions), locals())


def evict_(
    k: Tensor,
    v: Tensor | None,
    scores: Tensor,
    budgets: Ints | Plan,
    *,
    lengths: Ints | None = None,
    starts: Ints | None = None,
    cu_seqlens: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    max_budget: int | None = None,
    companions: Sequence[Tensor] = (),
    to: str = "front",
    page: int = 1,
    order: str = "ascending",
) -> RaggedIndex:
    """`evict` in place: the kept rows of each segment move to the front of its own buffer, or to the back.

    Rows `[0, n)` of every (sequence, head) become those that `evict` would return, whatever `starts` was; the rest of
    k, v and companions is untouched. With `to="back"` they become the last rows of the valid range, and what is dropped
    is a multiple of `page`: of `m` valid rows and a budget of `n`, `floor((m - n) / page) * page` are dropped, and the
    others, the best by score, end where the range ends. Allocates indices only, nothing of the size of K or V.

    Args:
        k: as in `evict`; written. No two elements of what is written may share memory, but interleaved views of one
            storage may lie beside each other.
        v: as in `evict`; written.
        scores: as in `evict`.
        budgets: as in `evict`.
        lengths: as in `evict`.
        starts: as in `evict`.
        cu_seqlens: as in `evict`.
        sink: as in `evict`.
        window: as in `evict`.
        max_budget: as in `evict`.
        companions: as in `evict`; written.
        to: "front" or "back".
        page: with `to="back"`, rows that are dropped together. The default drops all rows beyond the budget.
        order: "ascending", or "any": kept rows that lie where kept rows go stay there, and the others fill the holes
            between them, the one that is farthest away in the first hole (`to="back"`: in the last). The same rows are
            kept in the same places as a set, and fewer move, half as many where half of the cache is kept. For caches
            whose keys carry their positions; `positions` of the result are by the rows where they are now.

    Returns:
        `RaggedIndex`: where the kept rows were, and how many there are.

    Raises:
        ValueError, TypeError: as `evict`, also for overlapping memory and where a gradient is required.
    """
    try:
        back = back_of(to, page)
        options = (sink, window, "packed", None, max_budget, 0, 1, back, any_order_of(order))
        payload = [k, *companions] if v is None else [k, v, *companions]
        _check_rank(k, v, 4 if cu_seqlens is None else 2)
        derivatives.refuse(payload, "an eviction in place has no derivative")
        request = make_request(k, cu_seqlens, budgets, lengths, starts, options)
        index = ops.evict_(payload, [scores.detach()], *request.arguments)
        return new_index(index, request)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        errors.reraise("evict_", error, _names("k", "v", v, companions), given=locals())


def _evict(
    payload: list[Tensor], has_v: bool, scores: list[Tensor], request: Request, out: RaggedKV | None
) -> RaggedKV:
    if out is None:
        if request.plain and has_v and len(payload) == 2:
            k, v, positions, lengths, cu_seqlens = ops.evict_plain(*payload, *scores, *request.arguments)
            return RaggedKV(k, v, (), positions, lengths, cu_seqlens, request.max_length)
        return _ragged(ops.evict(payload, scores, *request.arguments), has_v, request)
    moved = [out.k, *out.companions] if out.v is None else [out.k, out.v, *out.companions]
    derivatives.refuse(moved, "what is in out is overwritten")
    index = [out.positions, out.lengths, out.cu_seqlens, *([] if out.overflow is None else [out.overflow])]
    ops.evict_out(moved + index, payload, scores, *request.arguments)
    out.max_length, out.reserve, out.align = request.max_length, request.reserve, request.align
    return out


def _select_and_gather(
    payload: list[Tensor],
    has_v: bool,
    scores: Tensor,
    cu_seqlens: Tensor | None,
    request: Request,
    out: RaggedKV | None,
) -> RaggedKV:
    """`_evict` with gradients. Neither op sees scores and rows together, so their fit is checked here."""
    if out is not None:
        raise ValueError("expected no out where gradients or tangents are required, got one")
    form, leading = ("[B, H, L]", payload[0].shape[:3]) if cu_seqlens is None else ("[T]", payload[0].shape[:1])
    if scores.shape != leading:
        raise ValueError(f"expected scores of shape {form} = {list(leading)}, got {list(scores.shape)}")
    if scores.device != payload[0].device:
        raise ValueError(f"expected scores on {payload[0].device}, got {scores.device}")
    index = ops.select([scores.detach()], *request.arguments)
    batch, heads = (0, 0) if cu_seqlens is None else (request.segments.batch, request.segments.heads)
    return _ragged(gather_rows(payload, index[0], index[2], cu_seqlens, batch, heads) + index, has_v, request)


def _ragged(result: list[Tensor], has_v: bool, request: Request) -> RaggedKV:
    """From what the ops return: the moved payload, positions, lengths, cu_seqlens and, where counted, overflow."""
    index = len(result) - (4 if request.counted else 3)
    return RaggedKV(
        result[0],
        result[1] if has_v else None,
        tuple(result[2 if has_v else 1 : index]),
        result[index],
        result[index + 1],
        result[index + 2],
        request.max_length,
        result[index + 3] if request.counted else None,
        request.reserve,
        request.align,
    )


def _check_rank(k: Tensor, v: Tensor | None, rank: int) -> None:
    form = "[B, H, L, D]" if rank == 4 else "[T, D]"
    why = "without cu_seqlens rows are dense" if rank == 4 else "with cu_seqlens rows are ragged"
    if not isinstance(k, Tensor) or not (v is None or isinstance(v, Tensor)):
        raise TypeError(f"expected k and v as tensors, got {type(k).__name__} and {type(v).__name__}")
    if k.dim() != rank:
        raise ValueError(f"expected k of shape {form}, got {list(k.shape)}: {why}")
    if v is not None and v.dim() != rank:
        raise ValueError(f"expected v of shape {form}, got {list(v.shape)}: {why}")


def _names(k: str, v: str, given_v: object, companions: object) -> list[str]:
    count = len(companions) if isinstance(companions, Sequence) else 0
    return [k, *([] if given_v is None else [v]), *(f"companions[{i}]" for i in range(count))]


@torch.library.register_fake("lkv_ext::evict")
def fake_evict(payload: list[Tensor], scores: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    given = Arguments(*args, **kwargs)
    fake.check_arguments(payload, scores, given)
    index = fake.index(payload, len(scores), given)
    return fake.moved(payload, len(scores), given.cu_seqlens, list(index[0].shape)) + index


@torch.library.register_fake("lkv_ext::evict_plain")
def fake_evict_plain(k: Tensor, v: Tensor, scores: Tensor, budgets: list[int], total: int) -> tuple[Tensor, ...]:
    return tuple(fake_evict([k, v], [scores], budgets, total))


@torch.library.register_fake("lkv_ext::evict_")
def fake_evict_(payload: list[Tensor], scores: list[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    given = Arguments(*args, **kwargs)
    fake.check_arguments(payload, scores, given)
    index = fake.index(payload, len(scores), given)
    return *index[:3], index[3] if given.count_overflow else payload[0].new_empty([0], dtype=torch.int32)


@torch.library.register_fake("lkv_ext::evict_out")
def fake_evict_out(out: list[Tensor], payload: list[Tensor], scores: list[Tensor], *args: Any, **kwargs: Any) -> None:
    fake.check_arguments(payload, scores, Arguments(*args, **kwargs))
    moved = [f"out[{i}]" for i in range(len(payload) // max(len(scores), 1))]
    names = [*moved, "out.positions", "out.lengths", "out.cu_seqlens", "out.overflow"]
    fake.check_devices(payload[0].device, dict(zip(names, out, strict=False)))


vmap.register("evict")
vmap.register("evict_plain")
