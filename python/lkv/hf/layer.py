"""One full-attention layer of `lkv.Cache` within a call: it begins with `update`, and `attend` makes rows."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add, attrgetter, sub
from typing import Any

import torch
from torch import Tensor

from lkv.hf.attention import Logits, own_attention
from lkv.hf.call import Call
from lkv.hf.masks import PaddingInfo
from lkv.hf.planning import EvictionPlan
from lkv.hf.queries import QueriesSnapshot
from lkv.hf.storage import Storage
from lkv.hf.versions import AttentionModule
from lkv_ext import RaggedCache
from lkv_ext.shared import keeps_tensors

COUNTS = (
    *("token_counts", "row_counts", "evicted", "evictions", "due"),
    *("scaling", "softcap", "sinks", "carried_heads", "is_initialized"),
)
_COUNTS = attrgetter(*COUNTS)


@dataclass(slots=True, eq=False)  # frozen would take longer, in every layer and step
class Snapshot:
    """A layer before a call, as far as it is not the rows themselves: what a call appends lies behind them."""

    layer: RaggedLayer
    length: int
    counts: tuple[Any, ...]
    rows: tuple[int, int, int] | None
    queries: QueriesSnapshot | None

    def restore(self) -> bool:
        """See `LayerBefore`."""
        return self.layer.restore(self)


class RaggedLayer(Storage):
    """`update` takes new keys and values, `attend` makes rows of them, as it sees the queries, too."""

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values `[B, H, n, D]`; returned is what the model's attention function shall be given.

        Raises:
            ValueError: for another shape, dtype or device than that of the rows, and where a gradient is required.
        """
        keys, values, rows = key_states, value_states, self.rows
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ValueError("lkv.Cache: expected a model run under torch.no_grad, got keys that require a gradient")
        if rows is not None:
            _check_tokens(keys, values, rows.lengths.shape, rows.k, rows.v)
        elif self.keys is not None and self.values is not None:
            _check_tokens(keys, values, self.keys.shape[:2], self.keys, self.values)
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.is_initialized = True
        return keys.view_as(keys), values  # nobody holds on to the keys, so that a note may go on them

    # What a cache calls.

    def attend(
        self, call: Call, own: str, module: AttentionModule, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None,
        logits: Logits, kwargs: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Attention of the new queries: `[B, n, Hq, Dv]`. In the layer whose keys they are, new tokens become rows.

        Args:
            own: the model's own attention, which runs while the rows are whole.
            states: queries `[B, Hq, n, D]`, and the keys and values that `update` returned.
        """
        (query, key, value), rows = states, self.rows
        if module.layer_idx != self.index:  # a layer that shares these keys, and may have the last queries alone
            if rows is None:
                return own_attention(own, module, query, key, value, mask, **kwargs)[0]
            call.check_mask(mask)
            return self._attend_rows(rows, call, query, logits)
        self.scaling, self.softcap, self.sinks = logits
        padding, count = call.padding, call.count
        if rows is None and padding is not None and self._leaves_gaps(padding, count):
            self.apply(EvictionPlan(None, None, self.row_counts))
            key, value, rows = key[:, :, -count:], value[:, :, -count:], self.rows
        if rows is None:
            out, _ = own_attention(own, module, query, key, value, mask, **kwargs)
            self._take(call, module, query, key, value)
            return out
        if count > 1:
            call.check_mask(mask)
        if torch.is_grad_enabled():  # of queries alone: none of keys is required
            with torch.no_grad():
                return self._append(rows, call, module, query, key, value, logits)
        return self._append(rows, call, module, query, key, value, logits)

    @keeps_tensors
    def _take(self, call: Call, module: AttentionModule, query: Tensor, key: Tensor, value: Tensor) -> None:
        """New whole rows, and all earlier ones."""
        padding = call.padding
        self.keys, self.values = key.view_as(key), value
        self._count(call, module, query)
        if padding is not None and padding.order is not None:  # rows know padding in front of tokens alone
            self.keys, self.values = _in_order(key, padding.order), _in_order(value, padding.order)
            self.apply(EvictionPlan(None, None, self.row_counts))
        self.due = call.due = True

    def _append(
        self, rows: RaggedCache, call: Call, module: AttentionModule, query: Tensor, key: Tensor, value: Tensor,
        logits: Logits,
    ) -> Tensor:  # fmt: skip
        """New packed rows, and attention to all."""
        padding = call.padding
        if padding is None:
            rows.append_unchecked(key, value, _zeros(rows, key))
        else:
            if padding.order is not None:
                key, value = _in_order(key, padding.order), _in_order(value, padding.order)
            rows.append(key, value, _zeros(rows, key), valid=padding.counts)
            self.evicted = rows.seen
        self._count(call, module, query)
        self.due = self.due or call.leaves_prompt
        call.due = call.due or self.due
        return self._attend_rows(rows, call, query, logits)

    def _attend_rows(self, rows: RaggedCache, call: Call, query: Tensor, logits: Logits) -> Tensor:
        """The queries are of the last of the new tokens: of all of them, except in layers that share keys."""
        scale, softcap, sinks = logits
        order = None if call.padding is None else call.padding.order
        if order is None:
            return rows.attend(query, scale=scale, softcap=softcap, sinks=sinks).transpose(1, 2).contiguous()
        left_out = call.count - query.shape[2]
        query = torch.nn.functional.pad(query, (0, 0, left_out, 0))
        out = rows.attend(_in_order(query, order), scale=scale, softcap=softcap, sinks=sinks).transpose(1, 2)
        out = torch.empty_like(out).scatter_(1, order.to(out.device)[:, :, None, None].expand_as(out), out)
        return out[:, left_out:].contiguous()

    def _leaves_gaps(self, padding: PaddingInfo, count: int) -> bool:
        """Whether whole rows would have padding between tokens, which an `Observation` cannot describe."""
        earlier = self.token_counts or [0] * len(padding.counts)
        return any(before and new < count for before, new in zip(earlier, padding.counts, strict=True))

    def _count(self, call: Call, module: AttentionModule, query: Tensor) -> None:
        batch, padding = call.batch, call.padding
        new = [call.count] * batch if padding is None else padding.counts
        heads = self.whole()[0].shape[1] if self.rows is None else self.rows.lengths.shape[1]
        self.token_counts = [*map(add, self.token_counts or [0] * batch, new)]
        self.row_counts = [*map(add, self.row_counts or [0] * batch, map(heads.__mul__, new))]
        if self.settings.observe:
            lasting = call.leaves_prompt or self.settings.cap is not None
            self.observations.push(module, call.seen, query, padding, lasting)

    def snapshot(self) -> Snapshot:
        """For `restore`."""
        rows, queries = self.rows, self.observations.queries
        if rows is None:
            length, rows_before = 0 if self.keys is None else self.keys.shape[2], None
        else:
            length, rows_before = rows.seen, rows.mark()
        return Snapshot(self, length, _COUNTS(self), rows_before, None if queries is None else queries.snapshot())

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
            self.keys, self.values = (t[:, :, : snapshot.length] for t in self.whole())
        vars(self).update(before)
        if packed:
            self.evicted = snapshot.length
        self.observations.restore(snapshot.queries, snapshot.length)
        return True


def _zeros(rows: RaggedCache, keys: Tensor) -> list[Tensor]:
    """What has been accumulated of new rows: nothing, for each companion of the rows."""
    return [c.new_zeros(*keys.shape[:3], *c.shape[1:]) for c in rows.companions]


def _in_order(tensor: Tensor, order: Tensor) -> Tensor:
    """`[B, H, n, D]` by `[B, n]`."""
    return tensor.gather(2, order.to(tensor.device)[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _check_tokens(keys: Tensor, values: Tensor, leading: torch.Size, old_keys: Tensor, old_values: Tensor) -> None:
    """Refuses new keys and values `[B, H, n, D]` that do not fit the rows of B sequences and H heads."""
    for name, new, old in (("keys", keys, old_keys), ("values", values, old_values)):
        shape = new.shape
        if shape[:2] != leading or shape[3] != old.shape[-1]:
            form = f"[{leading[0]}, {leading[1]}, n, {old.shape[-1]}]"
            raise ValueError(f"lkv.Cache: expected {name} of shape [B, H, n, D] = {form}, got {list(shape)}")
        if new.device != old.device or new.dtype != old.dtype:
            raise ValueError(
                f"lkv.Cache: expected {name} of {old.dtype} on {old.device}, got {new.dtype} on {new.device}"
            )
