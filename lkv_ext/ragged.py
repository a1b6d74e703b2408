"""What evict, select and gather return: the rows of every (sequence, KV head), each with a number of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lkv_ext._common.options import integer
from lkv_ext._common.paging import FreedBytes


class PackedRows(Protocol):
    """What `attend` and its backends read: `RaggedKV` in packed layout, or `RaggedCache`.

    Attributes:
        k: `[T, D]`.
        v: `[T, Dv]`.
        lengths: int32 `[B, H]`: rows in use.
        cu_seqlens: int32 `[B * H + 1]`: where the span of each segment begins.
        max_length: host bound of `lengths`.
        align: every span is a multiple of it.
        block_table: int32 `[B * H, pages]`, where `align` > 1 is the page size; else None.
    """

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor | None: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...
    @property
    def max_length(self) -> int: ...
    @property
    def align(self) -> int: ...
    @property
    def block_table(self) -> Tensor | None: ...


class PagedRows(Protocol):
    """What `attend` reads of a `PagedCache`.

    Attributes:
        k: the pool `[P, page, D]`.
        v: the pool `[P, page, Dv]`.
        tables: `[B, H, M]`: token t of a head is row t % page of page `tables[b, h, t // page]`.
        lengths: int32 `[B, H]`: rows in use.
        max_length: host bound of `lengths`.
    """

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def tables(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def max_length(self) -> int: ...
    def packed(self) -> RaggedKV: ...


@dataclass(eq=False, slots=True)
class RaggedIndex:
    """Which rows each (sequence, KV head) keeps, and where they go.

    Attributes:
        positions: int32 `[T']` (packed) or `[B, H, C]` (padded): positions of the kept rows in the coordinates of the
            input segment, ascending, or with `order="any"` by the rows where they are now; -1 in slack.
        lengths: int32 `[B, H]` (of several layers `[N, B, H]`): rows kept.
        cu_seqlens: int32 `[B * H + 1]`: where the span of each segment begins. Without reserve or alignment these
            are the prefix sums of `lengths`.
        max_length: host bound of `lengths`.
        overflow: int32 scalar on the device, rows cut because they did not fit; None where the host knew all sizes.
    """

    positions: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    max_length: int
    overflow: Tensor | None = None

    def __repr__(self) -> str:
        return f"RaggedIndex({_describe(self)})"


@dataclass(eq=False, slots=True)
class PagedIndex(FreedBytes, RaggedIndex):
    """What `evict_paged_` has kept and freed.

    Attributes:
        positions, lengths, cu_seqlens, max_length, overflow: as in `RaggedIndex`. Lengths are those of the logical
            sequences afterwards where rows moved to the front; where they moved to the back, rows kept.
        free_pages: int32, `[B]` or, of tables per head, `[B, H]`: pages of each table that no head and layer needs any
            more: the last ones of its used pages, or, with `to="back"`, the first ones.
        companion_free_pages: the same of `companion_tables`, one tensor each.
        row_bytes: bytes of a row of one head in all pools.
        page_bytes: bytes of a page of `tables`, and of each of `companion_tables`: all its heads, layers and pools.
    """

    free_pages: Tensor = field(kw_only=True)
    companion_free_pages: tuple[Tensor, ...] = field(kw_only=True, default=())
    row_bytes: int = field(kw_only=True, default=0)
    page_bytes: tuple[int, ...] = field(kw_only=True, default=(0,))

    def __repr__(self) -> str:
        return f"PagedIndex({_describe(self)})"


@dataclass(eq=False, slots=True)
class RaggedKV:
    """A KV cache in which every (sequence, KV head) has its own length.

    Packed: `k[:, None]`, `v[:, None]` and `cu_seqlens` are what FlashAttention varlen, FlashInfer ragged and
    `torch.nn.attention.varlen` read, every (sequence, KV head) a sequence for the query heads of its group. With
    `align` > 1 the buffers are also pools of single-head pages by view, `k.view(-1, align, 1, D)`, with `block_table`.

    Attributes:
        k: `[T', D]` (packed) or `[B, H, C, D]` (padded); slack rows are zero.
        v: `[T', Dv]` or `[B, H, C, Dv]`; None for caches of one tensor.
        companions: the companions of the call, `[T', ...]` or `[B, H, C, ...]`; slack is zero.
        positions: as in `RaggedIndex`.
        lengths: as in `RaggedIndex`.
        cu_seqlens: as in `RaggedIndex`.
        max_length: as in `RaggedIndex`.
        overflow: as in `RaggedIndex`.
        reserve: slack rows that every span was given.
        align: every span is a multiple of it.
    """

    k: Tensor
    v: Tensor | None
    companions: tuple[Tensor, ...]
    positions: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    max_length: int
    overflow: Tensor | None = None
    reserve: int = 0
    align: int = 1

    @property
    def block_table(self) -> Tensor | None:
        """int32 `[B * H, pages]`: the pages of each segment in order, where `align` > 1 is the page size; else None.

        Entries after the last page of a span repeat valid pages: readers stop at `lengths`.
        """
        if self.align == 1:
            return None
        return block_table(self.cu_seqlens, self.align, self.max_length + self.reserve, self.positions.numel())

    @property
    def index(self) -> RaggedIndex:
        """The positions without the rows."""
        return RaggedIndex(self.positions, self.lengths, self.cu_seqlens, self.max_length, self.overflow)

    def layer(self, i: int) -> RaggedKV:
        """Layer `i` of what `evict_layers` returned, as a view.

        Packed layers share the joint buffers: `cu_seqlens` of a layer are offsets into them, and need not begin at 0.
        """
        if self.lengths.dim() != 3:
            raise ValueError(
                f"lkv_ext.RaggedKV.layer: expected lengths of shape [N, B, H], got {list(self.lengths.shape)}"
            )
        layers, batch, heads = self.lengths.shape
        try:
            i = integer(i, "i")
        except TypeError as error:
            raise TypeError(f"lkv_ext.RaggedKV.layer: {error}") from None
        if not -layers <= i < layers:
            raise IndexError(f"lkv_ext.RaggedKV.layer: expected i in [0, {layers}), got {i}")
        i %= layers
        rows = batch * heads
        parts: dict[str, Any] = dict(lengths=self.lengths[i], cu_seqlens=self.cu_seqlens[i * rows : (i + 1) * rows + 1])
        if self.positions.dim() == 4:
            parts |= dict(k=self.k[i], positions=self.positions[i], companions=tuple(c[i] for c in self.companions))
            parts |= dict(v=None if self.v is None else self.v[i])
            if i > 0:  # spans of one layer are counted from its own buffers
                parts |= dict(cu_seqlens=parts["cu_seqlens"] - self.cu_seqlens[i * rows])
        return replace(self, **parts)

    def __repr__(self) -> str:
        v = "None" if self.v is None else str(list(self.v.shape))
        tensors = f"k={list(self.k.shape)}, v={v}, {self.k.dtype}, {len(self.companions)} companions"
        return f"RaggedKV({tensors}, {_describe(self)})"


def block_table(cu_seqlens: Tensor, align: int, longest: int, total: int) -> Tensor:
    """int32 `[B * H, pages]`: pages of `align` rows of each span in order, enough for `longest` rows, of `total` rows.

    Entries after the last page of a span are valid pages too: readers stop at their lengths.
    """
    pages = -(-longest // align)
    first = cu_seqlens[:-1, None] // align
    steps = torch.arange(pages, dtype=torch.int32, device=first.device)
    return (first + steps).clamp_(max=max(total // align - 1, 0))


def _describe(index: RaggedIndex | RaggedKV) -> str:
    form = "packed" if index.positions.dim() == 1 else "padded"
    return (
        f"{form}, {index.positions.numel()} rows with slack, lengths={list(index.lengths.shape)}, "
        f"max_length={index.max_length}, {index.positions.device}"
    )


def _register(cls: Any, static: tuple[str, ...]) -> None:
    """Makes a dataclass of tensors a pytree; `static` fields are part of the structure."""
    moving = tuple(field.name for field in fields(cls) if field.name not in static)

    def flatten(value: object) -> tuple[list[object], tuple[object, ...]]:
        return [getattr(value, name) for name in moving], tuple(getattr(value, name) for name in static)

    def unflatten(children: Iterable[Any], context: Any) -> Any:
        return cls(**dict(zip(moving, children, strict=True)), **dict(zip(static, context, strict=True)))

    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"lkv_ext.{cls.__name__}")


_register(RaggedIndex, ("max_length",))
_register(PagedIndex, ("max_length", "row_bytes", "page_bytes"))
_register(RaggedKV, ("max_length", "reserve", "align"))
