"""The cache of one layer in which every (sequence, KV head) has its own number of rows, for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor

from lkv_ext._common import errors
from lkv_ext._common.kinds import described, is_of
from lkv_ext._common.options import MOST, whole
from lkv_ext._torch import cache_state, spans
from lkv_ext._torch.cache_rows import RESERVE, CacheRows
from lkv_ext._torch.ints import device_of, int_list
from lkv_ext._torch.modes import keeps_tensors, plain
from lkv_ext.paged_cache import Allocator, PagedCache
from lkv_ext.ragged import RaggedKV


class RaggedCache(CacheRows):
    """K and V of one layer, packed, with slack behind every head into which new tokens are written in place.

    Attributes:
        k: `[T, D]`. Rows of (b, h) are `[cu_seqlens[r], cu_seqlens[r] + lengths[b, h])`, r = b * H + h; the rest of a
            span is slack, with any content.
        v: `[T, Dv]`, as `k`.
        companions: more tensors `[T, ...]` that move with the rows.
        positions: int32 `[T]`, the place of a row's token among all that were appended, counting padding and tokens
            evicted since.
        lengths: int32 `[B, H]`, rows in use.
        cu_seqlens: int32 `[B * H + 1]`, where the span of each segment begins.
        max_length: host bound of `lengths`.
        seen: tokens appended so far, counting padding and evicted ones: the logical length.
        align: every span is a multiple of it, whatever happens to the cache; see `block_table`.

    All methods that change a cache work in place. A call that raises leaves the cache as it was.
    """

    __slots__ = ()

    @keeps_tensors
    def __init__(self, kv: RaggedKV, seen: int, *, free: int | None = None, tail: int = 0) -> None:
        """Takes over the result of `evict` for dense input of `seen` tokens, or one layer of that of `evict_layers`.

        Args:
            kv: packed and of one layer, with v; `reserve` of that call is the slack, `align` stays. Tensors made in
                inference mode are copied, as they could not be appended to outside of it. From buffers that several
                layers share, the cache takes the rows of its own spans, by view.
            seen: tokens that the input had: the logical length.
            free: rows that every span is known to have left; with it, the spans fill the buffers from row 0 on and are
                not checked. Default: spans, lengths and positions are read and checked, which synchronises on CUDA.
            tail: how many of the last tokens every head is known to have: `crop` may drop these.

        Raises:
            ValueError, TypeError: for a padded kv, one without v, or one whose parts do not fit each other.
        """
        try:
            if not isinstance(kv, RaggedKV) or kv.v is None:
                raise ValueError(f"expected packed k and v of one layer, got {described(kv)}")
            parts = {name: getattr(kv, name) for name in cache_state.PARTS}
            cache_state.check_parts(parts, kv.companions)
            self.seen = whole(seen, "seen")
            self.max_length, self.align = whole(kv.max_length, "max_length"), whole(kv.align, "align", least=1)
            self._reserve = max(whole(kv.reserve, "reserve"), 1)
            whole_span = slice(None)
            if free is None:
                known = spans.read(parts, self.align, self.seen)
                free, whole_span = known.slack, slice(known.first, known.end)
                if known.longest > self.max_length:
                    raise ValueError(f"expected lengths of at most max_length = {self.max_length}, got {known.longest}")
                if whole(tail, "tail") > known.tail:
                    raise ValueError(
                        f"expected tail of at most {known.tail}, the last tokens that all heads have, got {tail}"
                    )
                if known.first:
                    parts["cu_seqlens"] = parts["cu_seqlens"] - known.first
            self._free = whole(free, "free")
            self.k, self.v, self.positions = (plain(parts[name][whole_span]) for name in ("k", "v", "positions"))
            self.companions = tuple(plain(c[whole_span]) for c in kv.companions)
            self.lengths, self.cu_seqlens = plain(parts["lengths"]), plain(parts["cu_seqlens"])
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            errors.reraise("RaggedCache", error, given=locals())
        self._table = None
        self._tail = whole(tail, "tail")

    @classmethod
    @keeps_tensors
    def empty(
        cls,
        batch: int,
        heads: int,
        dim: int,
        *,
        dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        dtype_v: torch.dtype | None = None,
        device: torch.device | str | None = None,
        reserve: int = RESERVE,
        align: int = 1,
    ) -> RaggedCache:
        """A cache without rows, with slack for later tokens.

        Args:
            batch: B, the number of sequences.
            heads: H, the number of KV heads.
            dim: D, the width of K.
            dim_v: Dv, the width of V; default: D.
            dtype: of K.
            dtype_v: of V; default: as K.
            device: default: torch's default device.
            reserve: slack rows of every head, rounded up to `align`.
            align: every span is a multiple of it.

        Raises:
            ValueError, TypeError: for an argument that is not a count, and more than 2**31 - 1 rows.
        """
        try:
            batch, heads, dim = whole(batch, "batch"), whole(heads, "heads"), whole(dim, "dim")
            dim_v = dim if dim_v is None else whole(dim_v, "dim_v")
            reserve, align = whole(reserve, "reserve"), whole(align, "align", least=1)
            rows, reserve = batch * heads, -(-reserve // align) * align
            if rows * reserve > MOST:
                raise ValueError(f"expected at most 2**31 - 1 rows, got {rows} heads of {reserve}")
            dtype_v = dtype if dtype_v is None else dtype_v
            for name, given in (("dtype", dtype), ("dtype_v", dtype_v)):
                if not isinstance(given, torch.dtype):
                    raise TypeError(f"expected {name} as a torch.dtype, got {described(given)}")
            device = device_of(device)
        except (RuntimeError, ValueError, TypeError) as error:
            errors.reraise("RaggedCache.empty", error)
        k = torch.zeros(rows * reserve, dim, dtype=dtype, device=device)
        v = k.new_zeros(rows * reserve, dim_v, dtype=dtype_v)
        positions = torch.full((rows * reserve,), -1, dtype=torch.int32, device=device)
        lengths = torch.zeros(batch, heads, dtype=torch.int32, device=device)
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device) * reserve
        return cls(RaggedKV(k, v, (), positions, lengths, ends, 0, reserve=reserve, align=align), 0, free=reserve)

    @staticmethod
    def paged(pools: Sequence[Tensor], allocator: Allocator, *, heads: int, batch: int = 1) -> PagedCache:
        """A cache whose rows lie in the pages of a pool that it shares with those of other requests.

        Args:
            pools: K `[P, page, D]`, V `[P, page, Dv]` and whatever moves with them, `[P, page, ...]`; a page, of a
                power of two of rows, is one head's. `lkv_ext.layout.heads_as_sequences` makes such views of pools
                whose pages hold all heads.
            allocator: a `PageAllocator` of the P pages, or an object of the engine with the same `take` and `give`,
                shared by the caches of the pool.
            heads: KV heads.
            batch: sequences, which grow together.

        Raises:
            ValueError, TypeError: for pools that do not fit each other or have no pages of one head.
        """
        return PagedCache(pools, allocator, heads=heads, batch=batch)

    @keeps_tensors
    def select_batch(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps the sequences `indices`, in that order; one may occur twice. Copies the rows; synchronises on CUDA.

        Raises:
            ValueError, TypeError: for an index of no sequence.
        """
        self._reorder(indices, "indices", "RaggedCache.select_batch")

    def _reorder(self, indices: Tensor | Sequence[int], name: str, called: str) -> None:
        try:
            order = int_list(indices, name)
            if not all(0 <= b < self.batch for b in order):
                raise ValueError(f"expected {name} of sequences in [0, {self.batch}), got {order}")
            if len(order) * self.heads > MOST:
                raise ValueError(f"expected at most 2**31 - 1 heads of all sequences, got {len(order)} sequences")
        except (RuntimeError, ValueError, TypeError) as error:
            errors.reraise(called, error, given={name: indices})
        chosen = torch.tensor(order, device=self.device, dtype=torch.int64)
        segments = (chosen[:, None] * self.heads + torch.arange(self.heads, device=self.device)).flatten()
        rows, ends = spans.rows_of(self.cu_seqlens, segments)
        for name in ("k", "v", "positions"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        self.companions = tuple(c.index_select(0, rows) for c in self.companions)
        self.lengths = self.lengths[chosen]
        self.cu_seqlens = ends

    @keeps_tensors
    def reorder(self, beams: Tensor | Sequence[int]) -> None:
        """Beam search: sequence b continues sequence `beams[b]`. As `select_batch`."""
        self._reorder(beams, "beams", "RaggedCache.reorder")

    def padded(self, rows: Tensor) -> Tensor:
        """`[T, ...]` as `[B, H, C, ...]` with C = max_length; behind a head's rows there is any content.

        Raises:
            ValueError: for rows that are not those of the buffers.
        """
        if not is_of("tensor", rows) or rows.shape[:1] != self.k.shape[:1]:
            raise ValueError(
                f"lkv_ext.RaggedCache.padded: expected rows of T = {self.k.shape[0]}, got {described(rows)}"
            )
        return spans.padded(rows, self.cu_seqlens, self.batch, self.max_length)

    def packed(self, scores: Tensor) -> Tensor:
        """`[B, H, C]` as `[T]`, the inverse of `padded`; slack takes any content.

        Raises:
            ValueError: for scores of another shape, or with C below `max_length`.
        """
        leading = (self.batch, self.heads)
        if (
            not is_of("tensor", scores)
            or scores.dim() != 3
            or scores.shape[:2] != leading
            or (scores.shape[2] < self.max_length)
        ):
            raise ValueError(
                f"lkv_ext.RaggedCache.packed: expected scores of shape [B, H, C] = {[*leading, self.max_length]}, got "
                f"{described(scores)}"
            )
        return spans.packed(scores, self.cu_seqlens, self.k.shape[0])

    @keeps_tensors
    def to(self, device: torch.device | str) -> RaggedCache:
        """Moves the cache; returns it.

        Raises:
            ValueError, TypeError: for a device that is not there.
        """
        try:
            if device is None:
                raise TypeError("expected device as a torch.device or its name, got None")
            target = device_of(device)
        except (RuntimeError, ValueError, TypeError) as error:
            errors.reraise("RaggedCache.to", error, given=locals())
        for name in cache_state.PARTS:
            setattr(self, name, getattr(self, name).to(target))
        self.companions = tuple(c.to(target) for c in self.companions)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of K, V and companions, with slack. Where layers share buffers: of the spans of this one."""
        return sum(t.nbytes for t in (self.k, self.v, *self.companions))

    @property
    def retained_bytes(self) -> int:
        """Bytes of the rows in use; synchronises on CUDA."""
        return int(self.lengths.sum()) * sum(t[:1].nbytes for t in (self.k, self.v, *self.companions) if t.shape[0])

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the cache to a safetensors file.

        Raises:
            ImportError: where safetensors is not installed.
        """
        cache_state.save(self, path)

    @classmethod
    @keeps_tensors
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> RaggedCache:
        """Reads what `save` wrote.

        Raises:
            ValueError: where the file is cut off, is not one of a cache, or its parts do not fit each other.
            ImportError: where safetensors is not installed.
        """
        try:
            target, state = device_of(device), cache_state.load(path)
            cache = cls.__new__(cls)
            cache._set(state)
            return cache.to(target)  # type: ignore[arg-type]  # None is refused there
        except (RuntimeError, ValueError, TypeError) as error:
            errors.reraise("RaggedCache.load", error)

    def __getstate__(self) -> dict[str, object]:
        return cache_state.state_of(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        try:
            self._set(state)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            errors.reraise("RaggedCache", error)

    def __repr__(self) -> str:
        k, v = (f"{list(t.shape)} {t.dtype}" for t in (self.k, self.v))
        return (
            f"RaggedCache(k={k}, v={v}, lengths={list(self.lengths.shape)}, "
            f"max_length={self.max_length}, seen={self.seen}, {self.device})"
        )

    def _set(self, state: dict[str, object]) -> None:
        """Makes this cache the one of `state`. Raises, before anything is set, where that is no state of a cache."""
        cache_state.check_state(state)
        for name, value in state.items():
            setattr(self, name, value)
        self._table = None
