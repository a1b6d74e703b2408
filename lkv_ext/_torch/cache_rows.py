"""The rows of a `RaggedCache`: tokens are appended, attended to, evicted and taken back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lkv_ext._common import errors
from lkv_ext._common.kinds import described
from lkv_ext._common.options import whole
from lkv_ext._torch import derivatives
from lkv_ext._torch.append import check_rows
from lkv_ext._torch.attend import attend
from lkv_ext._torch.evict import evict
from lkv_ext._torch.ints import Ints, Plan, int_list, split
from lkv_ext._torch.library import ops
from lkv_ext._torch.modes import keeps_tensors
from lkv_ext.ragged import RaggedKV, block_table

RESERVE = 64  # rows of slack behind every head, by default


class CacheRows:
    """K and V of one layer in spans with slack: what changes from token to token. See `RaggedCache`, which makes them.

    `_free` rows are left in every span, `_reserve` rows were when the spans were last laid out. `_tail` is how many of
    the last tokens every head has. `_table` holds `block_table`, with the cu_seqlens and the number of pages it is for.
    """

    __slots__ = ("_free", "_reserve", "_table", "_tail", "align", "companions", "cu_seqlens", "k", "lengths",
                 "max_length", "positions", "seen", "v")  # fmt: skip

    k: Tensor
    v: Tensor
    companions: tuple[Tensor, ...]
    positions: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    max_length: int
    seen: int
    align: int
    _free: int
    _reserve: int
    _tail: int
    _table: tuple[Tensor, int, Tensor] | None

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.lengths.shape[0]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.lengths.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all tensors of the cache are."""
        return self.k.device

    @property
    def block_table(self) -> Tensor | None:
        """int32 `[B * H, pages]` of the pools `k.view(-1, align, 1, D)`, as in `RaggedKV`; None where `align` is 1."""
        if self.align == 1:
            return None
        pages = -(-self.max_length // self.align)
        if self._table is None or self._table[0] is not self.cu_seqlens or self._table[1] != pages:
            table = block_table(self.cu_seqlens, self.align, self.max_length, self.k.shape[0])
            self._table = self.cu_seqlens, pages, table
        return self._table[2]

    def append(self, k: Tensor, v: Tensor, companions: Sequence[Tensor] = (), *, valid: Ints | None = None) -> None:
        """Writes n new tokens behind the rows of every head, in place.

        The buffers are reallocated only where the slack is used up, with twice the slack they had.

        Args:
            k: `[B, H, n, D]`, any strides with contiguous rows.
            v: `[B, H, n, Dv]`, as `k`.
            companions: `[B, H, n, ...]`, one for each of the cache's.
            valid: `[B]`, on the host or on the device: only the last `valid[b]` tokens of sequence b are kept, the
                others are padding on the left. Tokens appended with it cannot be cropped. Default: n.

        Raises:
            ValueError, TypeError: for another shape, dtype or device than the cache's.
        """
        names = ["k", "v", *(f"companions[{i}]" for i in range(len(self.companions)))]
        try:
            rows = [k, v, *companions]
            check_rows(rows, [self.k, self.v, *self.companions], names, self.batch, self.heads)
            counts = (None, None) if valid is None else split(valid, "valid", [(self.batch,)])
            self.append_unchecked(k, v, companions, counts)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            errors.reraise("RaggedCache.append", error, names, given=locals())

    def append_unchecked(
        self,
        k: Tensor,
        v: Tensor,
        companions: Sequence[Tensor] = (),
        valid: tuple[Sequence[int] | None, Tensor | None] = (None, None),
    ) -> None:
        """`append` for callers that made its checks; `valid` as `split` returns it, (None, None) for all tokens."""
        rows, count = [k, v, *companions], k.shape[2]
        if forward_ad._current_level >= 0:
            derivatives.refuse_tangents((*rows, self.k, self.v, *self.companions), "a cache has no derivative")
        if count > self._free:
            self._grow(count)
        buffers = [self.k, self.v, *self.companions]
        on_host, on_device = valid
        column = None if on_device is None else on_device.view(-1, 1)
        ops.append_(buffers, self.positions, self.lengths, self.cu_seqlens, rows, self.seen, on_host or None, column)
        self._free -= count
        self._tail = self._tail + count if on_host is None else 0
        self.max_length += count
        self.seen += count

    @keeps_tensors
    def evict(
        self,
        scores: Tensor,
        budgets: Ints | Plan,
        *,
        sink: int = 0,
        window: int = 0,
        max_budget: int | None = None,
        reserve: int | None = None,
    ) -> None:
        """Keeps the `budgets` best rows of every head, as `lkv_ext.evict` does.

        Args:
            scores: `[T]`, one per row of the buffers, such as a companion that carries scores; see `packed`.
            budgets: rows to keep per head, slack not counted; an int, `[H]` or `[B, H]`. In a device tensor they need
                `max_budget`, or the call synchronises once.
            sink: as in `lkv_ext.evict`.
            window: as in `lkv_ext.evict`.
            max_budget: upper bound for any one head.
            reserve: new slack rows per head; default: 64.

        Raises:
            ValueError, TypeError: as `lkv_ext.evict`.
        """
        try:
            slack = RESERVE if reserve is None else whole(reserve, "reserve")
            kept = self._evicted(scores, budgets, sink, window, max_budget, slack)
        except (RuntimeError, ValueError, TypeError) as error:
            errors.reraise("RaggedCache.evict", error, given=locals())
        self._take(kept, slack)
        self._tail = 0

    def attend(
        self,
        q: Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`lkv_ext.attend(q, self)`, with its arguments and errors: q `[B, Hq, n, D]` to `[B, Hq, n, Dv]`."""
        return attend(q, self, causal, scale=scale, softcap=softcap, sinks=sinks)

    @keeps_tensors
    def crop(self, tokens: int) -> None:
        """Drops the last `tokens` tokens of every head.

        Raises:
            ValueError: where some head may lack them: past an eviction, or past tokens appended with padding.
            TypeError: where `tokens` is not an int.
        """
        try:
            tokens = whole(tokens, "tokens")
        except (ValueError, TypeError) as error:
            errors.reraise("RaggedCache.crop", error)
        if not 0 <= tokens <= self._tail:
            raise ValueError(
                f"lkv_ext.RaggedCache.crop: expected at most the {self._tail} tokens appended since the last eviction, "
                f"got {tokens}"
            )
        self.lengths = self.lengths - tokens
        self.max_length -= tokens
        self.seen -= tokens
        self._tail -= tokens
        self._free += tokens

    def mark(self) -> tuple[int, int, int]:
        """What `restore` needs to take back later appends: seen, the tail and max_length."""
        return self.seen, self._tail, self.max_length

    @keeps_tensors
    def restore(self, mark: tuple[int, int, int], rows: Sequence[int]) -> None:
        """Takes back all appends since `mark`; nothing may have been evicted, cropped or selected in between.

        Args:
            mark: what `mark()` returned.
            rows: `[B]`, how many tokens of each sequence were kept since: all, or the sums of `valid`.

        Raises:
            ValueError: where there are fewer tokens than at the mark, or `rows` are more than came since.
            TypeError: for a mark of another kind.
        """
        try:
            if not isinstance(mark, tuple) or len(mark) != 3:
                raise TypeError(f"expected mark as a tuple that `mark` returned, got {described(mark)}")
            then, tail, longest = (whole(n, "mark") for n in mark)
            tokens, kept = self.seen - then, int_list(rows, "rows")
            if tokens < 0 or len(kept) != self.batch:
                raise ValueError(
                    f"expected a mark of at most {self.seen} tokens and rows of {self.batch} sequences, got {then} and "
                    f"{len(kept)}"
                )
            if any(not 0 <= n <= tokens for n in kept) or tail > then:
                raise ValueError(f"expected rows in [0, {tokens}], as many tokens came since the mark, got {kept}")
        except (RuntimeError, ValueError, TypeError) as error:
            errors.reraise("RaggedCache.restore", error, given=locals())
        if tokens:
            back = torch.tensor(kept, dtype=torch.int32, device=self.device)
            self.lengths = self.lengths - back[:, None]
            # What growth since has read of the lengths, it read behind tokens of which some sequences kept fewer.
            least = min(kept, default=0)
            self.max_length = min(longest, self.max_length - least)
            self._free += least
        self.seen, self._tail = then, tail

    @keeps_tensors
    def _grow(self, count: int) -> None:
        """Reallocates with the rows as they are and twice the slack, `count` rows at least."""
        reserve = max(2 * self._reserve, count)
        scores = self.k.new_zeros((), dtype=torch.float32).expand(self.k.shape[0])  # all rows stay: no score is read
        self._take(self._evicted(scores, self.max_length, 0, 0, None, reserve), reserve)

    def _evicted(
        self, scores: Tensor, budgets: Ints | Plan, sink: int, window: int, max_budget: int | None, reserve: int
    ) -> RaggedKV:
        return evict(
            self.k,
            self.v,
            scores,
            budgets,
            cu_seqlens=self.cu_seqlens,
            lengths=self.lengths,
            sink=sink,
            window=window,
            max_budget=max_budget,
            reserve=reserve,
            align=self.align,
            companions=(self.positions, *self.companions),
        )

    def _take(self, kv: RaggedKV, reserve: int) -> None:
        assert kv.v is not None  # as the cache has one
        self.k, self.v = kv.k, kv.v
        self.positions, *companions = kv.companions
        self.companions = tuple(companions)
        self.lengths, self.cu_seqlens, self.max_length = kv.lengths, kv.cu_seqlens, kv.max_length
        self._free, self._reserve = reserve, max(reserve, 1)
