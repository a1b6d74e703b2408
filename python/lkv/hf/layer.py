"""One full-attention layer of `lkv.Cache`: the whole rows of a prompt while it comes in, packed rows from then on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import lkv_ext
from lkv.hf.attention import LAYER, Real, check_arguments, own_attention, softcap_of
from lkv.hf.checks import check_tokens
from lkv.hf.choice import Choice
from lkv.hf.observe import Witness
from lkv.hf.settings import Settings
from lkv.hf.versions import CacheLayerMixin, new_tokens, tokens_to_drop
from lkv_ext.ops.modes import keeps_tensors

if TYPE_CHECKING:
    from lkv.hf.session import Session


@dataclass(frozen=True)
class Mark:
    """A layer before a call, as far as it is not the rows themselves: what a call appends lies behind them."""

    length: int
    counts: dict[str, object]
    rows: tuple[int, int] | None
    witness: object


class RaggedLayer(CacheLayerMixin):
    """`update` hands the new keys on with a note whose they are; `attend` does the work, as it also sees the queries.

    Attributes:
        rows: `lkv_ext.RaggedCache`, or None while the rows are whole, in `keys` and `values` `[B, H, L, D]`. Whole rows
            are never written to: copies of a cache may share them.
        real: per sequence, tokens appended so far without padding: its logical length.
        held: per sequence, rows of all heads together.
        evicted: logical length, padding included, at the last eviction: what came before cannot be cropped.
        due: tokens of a prompt have come since the last eviction.
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
        self.evicted = self.evictions = 0
        self.due = False
        self.scaling, self.softcap = 1.0, None
        self.witness = Witness(self.session)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.is_initialized = True

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.keys.shape[1] if self.rows is None else self.rows.heads

    # What transformers calls.

    @torch.compiler.disable
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
        self.held = [count - tokens * self.heads for count in self.held]
        self.witness.crop(tokens, self.get_seq_length())

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
        self.witness.select(indices)

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
        with self.session.all_or_nothing():
            self.session.taken_over()
            check_arguments(module, kwargs)
            scaling = kwargs.get("scaling")
            self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            self.softcap = softcap_of(own, kwargs)
            batch, _, count, _ = query.shape
            real = self.session.real_tokens(mask, batch, count)
            if self.rows is None and real is not None and self._leaves_gaps(real, count):
                self.keep(Choice(None, None, self.held), self.session.settings)
                key, value = key[:, :, -count:], value[:, :, -count:]
            if self.rows is None:
                out, _ = own_attention(own, module)(module, query, key, value, mask, **kwargs)
                self.keys, self.values, self.due = key.view_as(key), value, True
                self._count(module, query, real)
            else:
                out = self._attend_rows(module, query, key, value, real)
                self.due = self.due or count > 1
            self.session.leave(self.index)
        return out, None

    @keeps_tensors
    def _attend_rows(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, real: Real | None) -> Tensor:
        """Rows know padding in front of the new tokens alone, so that other padding is brought there."""
        order = None if real is None else real.order
        if order is not None:
            query, key, value = (
                t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in (query, key, value)
            )
        self.rows.append(key, value, valid=None if real is None else real.counts)
        self._count(module, query, real)
        if real is not None:
            self.evicted = self.rows.seen
        out = self.rows.attend(query, scale=self.scaling, softcap=self.softcap).transpose(1, 2)
        if order is None:
            return out.contiguous()
        return torch.empty_like(out).scatter_(1, order[:, :, None, None].expand_as(out), out)

    def _leaves_gaps(self, real: Real, count: int) -> bool:
        """Whether whole rows would have padding between tokens, which the policies' view of them has no words for.

        Raises:
            ValueError: for padding behind the first tokens of a sequence.
        """
        earlier = self.real or [0] * len(real.counts)
        if any(before and new < count for before, new in zip(earlier, real.counts, strict=True)):
            return True
        if real.order is not None:
            raise ValueError("lkv.Cache: expected padding on the left of a sequence, got some behind its first token")
        return False

    def _count(self, module: nn.Module, query: Tensor, real: Real | None) -> None:
        batch, _, count, _ = query.shape
        new = [count] * batch if real is None else real.counts
        before, held = self.real or [0] * batch, self.held or [0] * batch
        self.real = [a + b for a, b in zip(before, new, strict=True)]
        self.held = [a + b * self.heads for a, b in zip(held, new, strict=True)]
        self.witness.push(module, self.get_seq_length() - count, query, real)

    # What the session and an eviction call.

    def mark(self) -> Mark:
        """For `restore`."""
        names = ("real", "held", "evicted", "evictions", "due", "scaling", "softcap", "is_initialized")
        counts = {name: getattr(self, name) for name in names}
        rows = None if self.rows is None else self.rows.mark()
        return Mark(self.get_seq_length(), counts, rows, self.witness.mark())

    @keeps_tensors
    def restore(self, mark: Mark) -> bool:
        """Takes the tokens back that came since; False where rows were evicted, which do not come back."""
        if self.evictions != mark.counts["evictions"] and mark.length > 0:
            return False
        packed = mark.rows is None and self.rows is not None  # since: all rows are there, but no longer whole
        if mark.length == 0:
            self.keys = self.values = self.rows = None
        elif self.rows is not None:
            new = [now - before for now, before in zip(self.real, mark.counts["real"], strict=True)]
            self.rows.restore(mark.rows or (mark.length, 0), new)
        else:
            self.keys, self.values = self.keys[:, :, : mark.length], self.values[:, :, : mark.length]
        vars(self).update(mark.counts)
        if packed:
            self.evicted = mark.length
        self.witness.restore(mark.witness, mark.length)
        return True

    @keeps_tensors
    def keep(self, choice: Choice, settings: Settings) -> None:
        """Evicts what was not chosen; whole rows are packed, and the whole ones let go."""
        policy, reserve, everything = settings.policy, settings.reserve, choice.scores is None
        if self.rows is None:
            batch, heads, length = self.keys.shape[:3]
            lengths = torch.tensor(self.real)[:, None].expand(batch, heads)
            scores = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.float32) if everything else choice.scores
            budgets = lengths if everything else choice.budgets
            # Budgets made on a GPU stay there: what they add up to is known here.
            capacity = None if budgets.is_cpu else sum(choice.held) + budgets.numel() * reserve
            kept = lkv_ext.evict(
                self.keys,
                self.values,
                scores,
                budgets,
                lengths=lengths,
                starts=length - lengths,
                sink=policy.sink,
                window=policy.window,
                capacity=capacity,
                reserve=reserve,
            )
            self.rows = lkv_ext.RaggedCache(kept, length, free=reserve)
            self.keys = self.values = None
        elif not everything:
            self.rows.evict(
                self.rows.packed(choice.scores),
                choice.budgets,
                sink=policy.sink,
                window=policy.window,
                reserve=reserve,
            )
        else:
            self.due = False
            return
        self.held, self.evicted, self.due = choice.held, self.get_seq_length(), False
        self.evictions += not everything
