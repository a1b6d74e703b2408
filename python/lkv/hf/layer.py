"""One full-attention layer of `lkv.Cache`: the whole rows of a prompt while it comes in, packed rows from then on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import lkv_ext
from lkv.hf.attention import LAYER, check_arguments, own_attention, softcap_of
from lkv.hf.checks import ask, check_tokens
from lkv.hf.modes import keeps_tensors
from lkv.hf.queries import LastQueries
from lkv.hf.versions import CacheLayerMixin, new_tokens, tokens_to_drop
from lkv.policies import Observation

if TYPE_CHECKING:
    from lkv.hf.session import Session


class RaggedLayer(CacheLayerMixin):
    """`update` hands the new keys on with a note whose they are; `attend` does the work, as it also sees the queries.

    Attributes:
        rows: `lkv_ext.RaggedCache`, or None while the rows are whole, in `keys` and `values` `[B, H, L, D]`.
        real: per sequence, tokens appended so far without padding: its logical length.
        held: per sequence, rows of all heads together.
        evicted: logical length, padding included, at the last eviction: what came before cannot be cropped.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # not back to every length, which is what transformers asks

    def __init__(self, session: Session, index: int) -> None:
        super().__init__()
        self.session, self.index = session, index
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.rows: lkv_ext.RaggedCache | None = None
        self.real: list[int] = []
        self.held: list[int] = []
        self.evicted = 0
        self.due = False  # tokens of a prompt have come since the last eviction
        self.scaling, self.softcap = 1.0, None
        policy = self.session.settings.policy
        self.queries = LastQueries(max(policy.window, 1)) if "queries" in policy.needs else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.is_initialized = True

    # What transformers calls.

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values `[B, H, n, D]`; returned is what the model's attention function shall be given."""
        self.session.expect_idle()
        check_tokens(self, key_states, value_states)
        self.is_initialized = True
        if self.due and key_states.shape[2] == 1:
            self.evict()
        keys, values = key_states, value_states
        if self.rows is None and self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        keys = keys.view_as(keys)  # the note goes on a tensor that nobody holds on to
        setattr(keys, LAYER, self)
        self.session.hand_over(self)
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
        least = max(self.evicted, seen - min(self.real, default=0))
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
        self.real = [count - tokens for count in self.real]
        self.held = [count - tokens * self._heads() for count in self.held]
        if self.queries is not None:
            self.queries.crop(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.real)).repeat_interleave(repeats))

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
        self.real, self.held = [self.real[b] for b in order], [self.held[b] for b in order]
        if self.queries is not None:
            self.queries.select(indices)

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
        self.session.taken_over()
        check_arguments(module, kwargs)
        scaling = kwargs.get("scaling")
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap = softcap_of(own, kwargs)
        batch, _, count, _ = query.shape
        valid = self.session.real_tokens(mask, batch, count)
        if self.rows is None:
            return self._attend_whole(own, module, query, key, value, mask, valid, kwargs)
        return self._attend_rows(query, key, value, valid), None

    def _attend_whole(
        self,
        own: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        valid: list[int] | None,
        kwargs: dict[str, object],
    ) -> tuple[Tensor, None]:
        out, _ = own_attention(own, module)(module, query, key, value, mask, **kwargs)
        with self._taken_back_on_error():
            self.keys, self.values = key.view_as(key), value
            self._count(query, valid)
            if self.session.settings.chunks == "each":
                self.evict()
            else:
                self.due = True
        return out, None

    @keeps_tensors
    def _attend_rows(self, query: Tensor, key: Tensor, value: Tensor, valid: list[int] | None) -> Tensor:
        settings, count = self.session.settings, query.shape[2]
        if count == 1:
            if settings.cap is not None and max(self.held) + self._heads() > settings.cap * self._heads():
                self.evict(settings.cap - settings.interval)
            return self._append(query, key, value, valid)
        with self._taken_back_on_error():
            out = self._append(query, key, value, valid)
            if settings.chunks == "each":
                self.evict()
            else:
                self.due = True
        return out

    def _append(self, query: Tensor, key: Tensor, value: Tensor, valid: list[int] | None) -> Tensor:
        self.rows.append(key, value, valid=valid)
        out = self.rows.attend(query, scale=self.scaling, softcap=self.softcap)
        self._count(query, valid)
        if valid is not None:
            self.evicted = self.rows.seen
        return out.transpose(1, 2).contiguous()

    @contextmanager
    def _taken_back_on_error(self) -> Iterator[None]:
        """Several tokens come whole or not at all: what they write lies behind the rows that were there."""
        before = dict(vars(self), rows=copy.copy(self.rows), queries=copy.copy(self.queries))
        if self.rows is not None:
            before["rows"].lengths = self.rows.lengths.clone()
        try:
            yield
        except Exception:
            vars(self).update(before)
            raise

    def _count(self, query: Tensor, valid: list[int] | None) -> None:
        batch, _, count, _ = query.shape
        new = [count] * batch if valid is None else valid
        real, held = self.real or [0] * batch, self.held or [0] * batch
        heads = self._heads()
        self.real = [a + b for a, b in zip(real, new, strict=True)]
        self.held = [a + b * heads for a, b in zip(held, new, strict=True)]
        if self.queries is not None:
            self.queries.push(query, valid)

    # Eviction.

    @keeps_tensors
    def evict(self, rows: int | None = None) -> None:
        """Brings every sequence to `rows` per head, or to what the settings say of its logical length."""
        settings, heads = self.session.settings, self._heads()
        totals = [
            min(held, heads * (settings.target(real) if rows is None else rows))
            for real, held in zip(self.real, self.held, strict=True)
        ]
        policy, seen = settings.policy, self.get_seq_length()
        if totals == self.held and self.rows is not None:
            self.due = False
            return
        observed = self._observe()
        if totals == self.held:
            scores, budgets = observed.keys.new_zeros(observed.keys.shape[:3], dtype=torch.float32), observed.lengths
        else:
            scores, budgets = ask(policy, self.index, observed, totals)
        if self.rows is None:
            self._pack(observed, scores, budgets, totals)
        else:
            self.rows.evict(
                self.rows.packed(scores), budgets, sink=policy.sink, window=policy.window, reserve=settings.reserve
            )
        self.held, self.evicted, self.due = totals, seen, False

    def _pack(self, observed: Observation, scores: Tensor, budgets: Tensor, totals: Sequence[int]) -> None:
        """From whole rows to packed ones; the whole ones are let go."""
        policy, reserve = self.session.settings.policy, self.session.settings.reserve
        # Budgets made on a GPU stay there: what they add up to is known here.
        capacity = None if budgets.is_cpu else sum(totals) + budgets.numel() * reserve
        kept = lkv_ext.evict(
            self.keys,
            self.values,
            scores,
            budgets,
            lengths=observed.lengths,
            starts=observed.starts,
            sink=policy.sink,
            window=policy.window,
            capacity=capacity,
            reserve=reserve,
        )
        self.rows = lkv_ext.RaggedCache(kept, self.get_seq_length())
        self.keys = self.values = None

    def _observe(self) -> Observation:
        queries = (None, None, None) if self.queries is None else self.queries.read()
        if self.rows is None:
            batch, heads, length = self.keys.shape[:3]
            device = self.keys.device
            lengths = torch.tensor(self.real, device=device)[:, None].expand(batch, heads)
            keys, values, starts = self.keys, self.values, length - lengths
            positions = torch.arange(length, device=device).expand(batch, heads, length)
        else:
            keys, values, positions = map(self.rows.padded, (self.rows.k, self.rows.v, self.rows.positions))
            lengths = self.rows.lengths.long()
            starts = torch.zeros_like(lengths)
        return Observation(keys, values, positions, lengths, starts, *queries, self.scaling, self.softcap)

    def _heads(self) -> int:
        return self.keys.shape[1] if self.rows is None else self.rows.heads
