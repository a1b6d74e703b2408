"""One full-attention layer of `lkv.Cache`: the whole rows of a prompt while it comes in, packed rows from then on."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add, attrgetter, sub
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import lkv_ext
from lkv.hf.attention import LAYER, check_arguments, logits_of, own_attention
from lkv.hf.checks import check_tokens
from lkv.hf.masks import PaddingInfo
from lkv.hf.observation import ObservationBuffer
from lkv.hf.planning import EvictionPlan
from lkv.hf.versions import CacheLayerMixin, new_tokens, outside_graphs, tokens_to_drop
from lkv_ext.shared import keeps_tensors

if TYPE_CHECKING:
    from lkv.hf.session import Session


COUNTS = ("token_counts", "row_counts", "evicted", "evictions", "due", "scaling", "softcap", "sinks", "is_initialized")
_COUNTS = attrgetter(*COUNTS)


@dataclass(frozen=True)
class Snapshot:
    """A layer before a call, as far as it is not the rows themselves: what a call appends lies behind them."""

    length: int
    counts: tuple[object, ...]
    rows: tuple[int, int, int] | None
    observations: object


class RaggedLayer(CacheLayerMixin):
    """`update` hands the new keys on with a note whose they are; `attend` does the work, as it also sees the queries.

    Attributes:
        rows: `lkv_ext.RaggedCache`, or None while the rows are whole, in `keys` and `values` `[B, H, L, D]`. Whole rows
            are never written to: copies of a cache may share them.
        token_counts: per sequence, tokens appended so far without padding: its logical length.
        row_counts: per sequence, rows of all heads together.
        evicted: logical length, padding included, at the last eviction: what came before cannot be cropped.
        due: tokens of a prompt have come since the last eviction.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True  # behind the last eviction, which waits where transformers is to crop (see `Session`)

    def __init__(self, session: Session, index: int) -> None:
        super().__init__()
        self.session, self.index = session, index
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.rows: lkv_ext.RaggedCache | None = None
        self.token_counts: list[int] = []
        self.row_counts: list[int] = []
        self.evicted = self.evictions = 0
        self.due = False
        self.scaling, self.softcap, self.sinks = 1.0, None, None
        self._home: torch.device | None = None
        self.observations = ObservationBuffer(self.session)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.is_initialized = True

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.keys.shape[1] if self.rows is None else self.rows.lengths.shape[1]

    @property
    def device(self) -> torch.device | None:
        return getattr(self.keys if self.rows is None else self.rows, "device", None)

    @property
    def dtype(self) -> torch.dtype | None:
        return getattr(self.keys if self.rows is None else self.rows.k, "dtype", None)

    # What transformers calls.

    @outside_graphs
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values `[B, H, n, D]`; returned is what the model's attention function shall be given."""
        check_tokens(self, key_states, value_states)
        self.is_initialized = True
        keys, values = key_states, value_states
        if self.rows is None and self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        keys = keys.view_as(keys)  # the note goes on a tensor that nobody holds on to
        setattr(keys, LAYER, self)
        return keys, values

    def get_seq_length(self) -> int:
        """Logical: evicted tokens count."""
        if self.rows is not None:
            return self.rows.seen
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys to mask: all of them while the rows are whole, then the new ones alone."""
        count, seen = new_tokens(query), self.get_seq_length()
        return (seen + count, 0) if self.rows is None else (count, seen)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def check_crop(self, argument: int) -> int:
        """Tokens to drop.

        Raises:
            ValueError: where rows of the length asked for are gone.
        """
        seen = self.get_seq_length()
        tokens = tokens_to_drop(argument, seen)
        least = max(self.evicted, seen - min(self.token_counts, default=0))
        if seen - tokens < least:
            raise ValueError(
                f"lkv.Cache.crop: expected a length of at least {least}, where rows were last evicted or came with "
                f"padding, got {seen - tokens}"
            )
        return tokens

    @keeps_tensors
    def crop(self, argument: int) -> None:
        tokens = self.check_crop(argument)
        if tokens == 0:
            return
        if self.rows is not None:
            self.rows.crop(tokens)
        else:
            self.keys, self.values = self.keys[:, :, :-tokens], self.values[:, :, :-tokens]
        self.token_counts = [count - tokens for count in self.token_counts]
        self.row_counts = [count - tokens * self.heads for count in self.row_counts]
        self.observations.crop(tokens, self.get_seq_length())

    @keeps_tensors
    def offload(self) -> None:
        """Moves the rows to the host. They must be brought back before the next call: see `prefetch`."""
        if self.device is not None:
            self._home = self.device
            self._move("cpu")

    @keeps_tensors
    def prefetch(self) -> None:
        """Moves the rows to where they were before `offload`."""
        if self.device is not None and self._home is not None:
            self._move(self._home)

    def _move(self, device: torch.device | str) -> None:
        if self.rows is not None:
            self.rows.to(device)
        else:
            self.keys, self.values = self.keys.to(device), self.values.to(device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @keeps_tensors
    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows is not None:
            self.rows.select_batch(indices)
        elif self.keys is not None:
            chosen = indices.to(self.keys.device)
            self.keys, self.values = self.keys[chosen], self.values[chosen]
        else:
            return
        order = indices.tolist()  # one synchronisation on CUDA
        self.token_counts, self.row_counts = [self.token_counts[b] for b in order], [self.row_counts[b] for b in order]
        self.observations.select(indices)

    # What the attention function calls.

    def attend(
        self,
        own: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attention of the new queries `[B, Hq, n, D]`: `[B, n, Hq, Dv]`. Then, if it is time, the eviction.

        Args:
            own: the model's own attention, which runs while the rows are whole.
            key, value: what `update` returned.
        """
        call, last = self.session.call, self.session.attended(self.index, module.layer_idx)
        check_arguments(module, query, mask, kwargs)
        scaling, softcap, sinks = logits_of(own, query, kwargs)
        if module.layer_idx == self.index:
            self.scaling, self.softcap, self.sinks = scaling, softcap, sinks
            out = self._attend_first(own, module, query, key, value, mask, **kwargs)
        elif self.rows is None:
            out, _ = own_attention(own, module, query, key, value, mask, **kwargs)
        else:
            call.check_mask(mask)
            out = self._attend_rows(query, scaling, softcap, sinks)
        if last and call.prompt:
            self.session.leave(self)
        return out, None

    def _attend_first(
        self,
        own: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: object,
    ) -> Tensor:
        """Of the layer whose keys they are: the new tokens become rows."""
        call = self.session.call
        padding, count = call.padding, call.count
        if self.rows is None and padding is not None and self._leaves_gaps(padding, count):
            self.keep(EvictionPlan(None, None, self.row_counts), self.session.settings.reserve)
            key, value = key[:, :, -count:], value[:, :, -count:]
        if self.rows is not None:
            if count > 1:
                call.check_mask(mask)
            return self._append(module, query, key, value, padding)
        out, _ = own_attention(own, module, query, key, value, mask, **kwargs)
        self._take(module, query, key, value, padding)
        return out

    @keeps_tensors
    def _take(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, padding: PaddingInfo | None) -> None:
        """New whole rows, and all earlier ones."""
        self.keys, self.values = key.view_as(key), value
        self._count(module, query, padding)
        if padding is not None and padding.order is not None:  # rows know padding in front of tokens alone
            self.keys, self.values = _in_order(key, padding.order), _in_order(value, padding.order)
            self.keep(EvictionPlan(None, None, self.row_counts), self.session.settings.reserve)
        self.due = self.session.call.due = True

    @keeps_tensors
    def _append(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, padding: PaddingInfo | None
    ) -> Tensor:
        """New packed rows, and attention to all."""
        call = self.session.call
        if padding is not None and padding.order is not None:
            key, value = _in_order(key, padding.order), _in_order(value, padding.order)
        self.rows.append(key, value, valid=None if padding is None else padding.counts)
        self._count(module, query, padding)
        self.due = self.due or call.prompt
        call.due = call.due or self.due
        if padding is not None:
            self.evicted = self.rows.seen
        return self._attend_rows(query, self.scaling, self.softcap, self.sinks)

    def _attend_rows(self, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        """Of queries of the last of the tokens that came, which are all, save in layers that share keys."""
        call = self.session.call
        order = None if call.padding is None else call.padding.order
        if order is None:
            out = self.rows.attend(query, scale=scale, softcap=softcap, sinks=sinks)
            return out.transpose(1, 2).contiguous()
        left_out = call.count - query.shape[2]
        query = torch.nn.functional.pad(query, (0, 0, left_out, 0))
        out = self.rows.attend(_in_order(query, order), scale=scale, softcap=softcap, sinks=sinks).transpose(1, 2)
        out = torch.empty_like(out).scatter_(1, order.to(out.device)[:, :, None, None].expand_as(out), out)
        return out[:, left_out:].contiguous()

    def _leaves_gaps(self, padding: PaddingInfo, count: int) -> bool:
        """Whether whole rows would have padding between tokens, which the policies' view of them has no words for."""
        earlier = self.token_counts or [0] * len(padding.counts)
        return any(before and new < count for before, new in zip(earlier, padding.counts, strict=True))

    def _count(self, module: nn.Module, query: Tensor, padding: PaddingInfo | None) -> None:
        batch, _, count, _ = query.shape
        new = [count] * batch if padding is None else padding.counts
        heads = self.heads
        self.token_counts = [*map(add, self.token_counts or [0] * batch, new)]
        self.row_counts = [*map(add, self.row_counts or [0] * batch, map(heads.__mul__, new))]
        self.observations.push(module, self.get_seq_length() - count, query, padding)

    # What the session and an eviction call.

    def snapshot(self) -> Snapshot:
        """For `restore`."""
        rows = None if self.rows is None else self.rows.mark()
        return Snapshot(self.get_seq_length(), _COUNTS(self), rows, self.observations.snapshot())

    @keeps_tensors
    def restore(self, snapshot: Snapshot) -> bool:
        """Takes the tokens back that came since; False where rows were evicted, which do not come back."""
        before = dict(zip(COUNTS, snapshot.counts, strict=True))
        if self.evictions != before["evictions"] and snapshot.length > 0:
            return False
        packed = snapshot.rows is None and self.rows is not None  # since: all rows are there, but no longer whole
        if snapshot.length == 0:
            self.keys = self.values = self.rows = None
        elif self.rows is not None:
            new = [*map(sub, self.token_counts, before["token_counts"])]
            self.rows.restore(snapshot.rows or (snapshot.length, 0, snapshot.length), new)
        else:
            self.keys, self.values = self.keys[:, :, : snapshot.length], self.values[:, :, : snapshot.length]
        vars(self).update(before)
        if packed:
            self.evicted = snapshot.length
        self.observations.restore(snapshot.observations, snapshot.length)
        return True

    @keeps_tensors
    def keep(self, plan: EvictionPlan, reserve: int) -> None:
        """Evicts what was not chosen; whole rows are packed, and the whole ones let go."""
        everything = plan.scores is None
        if self.rows is None:
            batch, heads, length = self.keys.shape[:3]
            lengths = torch.tensor(self.token_counts)[:, None].expand(batch, heads)
            scores = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.float32) if everything else plan.scores
            budgets = lengths if everything else plan.budgets
            # Budgets made on a GPU stay there: what they add up to is known here.
            capacity = None if budgets.is_cpu else sum(plan.row_counts) + budgets.numel() * reserve
            kept = lkv_ext.evict(
                self.keys,
                self.values,
                scores,
                budgets,
                lengths=lengths,
                starts=length - lengths,
                sink=plan.sink,
                window=plan.window,
                capacity=capacity,
                reserve=reserve,
            )
            tail = min(self.token_counts, default=0) if everything else 0
            self.rows = lkv_ext.RaggedCache(kept, length, free=reserve, tail=tail)
            self.keys = self.values = None
        elif not everything:
            self.rows.evict(
                self.rows.packed(plan.scores),
                plan.budgets,
                sink=plan.sink,
                window=plan.window,
                reserve=reserve,
            )
        else:
            self.due = False
            return
        self.row_counts, self.due = plan.row_counts, False
        if not everything:
            self.evicted, self.evictions = self.get_seq_length(), self.evictions + 1


def _in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """`[B, H, n, D]` by `[B, n]`."""
    return tensor.gather(2, order.to(tensor.device)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))
