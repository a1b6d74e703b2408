"""The rows of one layer between calls: whole while a prompt comes in, packed from then on; evicted by a plan."""

from __future__ import annotations

from operator import sub

import torch
from torch import Tensor

import lkv_ext
from lkv.hf.observation import ObservationBuffer
from lkv.hf.planning import EvictionPlan
from lkv.hf.settings import Settings
from lkv.hf.token_log import Rotations
from lkv.hf.versions import CacheLayerMixin, new_tokens, tokens_to_drop
from lkv.policies import Carried
from lkv_ext.shared import keeps_tensors


class Storage(CacheLayerMixin):
    """Keys and values of one layer, and what is counted and observed of them.

    Attributes:
        index, rank: which of the model's layers it is; which of the layers that are evicted, and how many these are.
        rows: `lkv_ext.RaggedCache`, or None while the rows are whole, in `keys` and `values` `[B, H, L, D]`. Whole rows
            are never written to: copies of a cache may share them.
        token_counts: per sequence, tokens appended so far without padding: its logical length.
        row_counts: per sequence, rows of all heads together.
        evicted: logical length, padding included, at the last eviction: what came before cannot be cropped.
        due: tokens of a prompt have come since the last eviction.
        carried_heads: `[B, H, n]`, what the policy has accumulated of heads; of rows it is a companion of `rows`.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True  # behind the last eviction, which waits where transformers is to crop (see `Call.draft`)

    def __init__(self, settings: Settings, rotations: Rotations, index: int, rank: tuple[int, int]) -> None:
        super().__init__()
        self.settings, self.rotations, self.index, self.rank = settings, rotations, index, rank
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.rows: lkv_ext.RaggedCache | None = None
        self.token_counts: list[int] = []
        self.row_counts: list[int] = []
        self.evicted = self.evictions = 0
        self.due = False
        self.scaling = 1.0
        self.softcap: float | None = None
        self.sinks: Tensor | None = None
        self.carried_heads: Tensor | None = None
        self._home: torch.device | None = None
        self.observations = ObservationBuffer(self.settings, self.rotations)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.is_initialized = True

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values while the rows are whole, `[B, H, L, D]`. Raises ValueError where they are not."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise ValueError(f"lkv.Cache: expected whole rows in layer {self.index}, got packed ones or no tokens")
        return keys, values

    def carried(self) -> Carried | None:
        """What the policy had accumulated at the last eviction; 0 for rows that came since. None: nothing."""
        sums = None if self.rows is None or not self.rows.companions else self.rows.padded(self.rows.companions[0])
        return None if sums is None and self.carried_heads is None else Carried(sums, self.carried_heads)

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.whole()[0].shape[1] if self.rows is None else self.rows.lengths.shape[1]

    @property
    def device(self) -> torch.device | None:
        return getattr(self.keys if self.rows is None else self.rows, "device", None)

    @property
    def dtype(self) -> torch.dtype | None:
        return getattr(self.keys if self.rows is None else self.rows.k, "dtype", None)

    # What transformers calls.

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
            ValueError: where rows of that length are gone.
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
            self.keys, self.values = (t[:, :, :-tokens] for t in self.whole())
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
            self.keys, self.values = (t.to(device) for t in self.whole())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @keeps_tensors
    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows is not None:
            self.rows.select_batch(indices)
        elif self.keys is not None:
            chosen = indices.to(self.keys.device)
            self.keys, self.values = (t[chosen] for t in self.whole())
        else:
            return
        order = indices.tolist()  # one synchronisation on CUDA
        self.token_counts, self.row_counts = [self.token_counts[b] for b in order], [self.row_counts[b] for b in order]
        heads = self.carried_heads
        self.carried_heads = None if heads is None else heads[indices.to(heads.device)]
        self.observations.select(indices)

    # What a cache calls.

    @keeps_tensors
    def apply(self, plan: EvictionPlan) -> None:
        """Evicts all rows but those of the plan; whole rows are packed, and the whole ones let go."""
        reserve, scores, budgets = self.settings.reserve, plan.scores, plan.budgets
        everything = scores is None
        sums = () if plan.carried is None or plan.carried.rows is None else (plan.carried.rows,)
        if self.rows is None:
            keys, values = self.whole()
            batch, heads, length = keys.shape[:3]
            lengths = torch.tensor(self.token_counts, device="cpu")[:, None].expand(batch, heads)
            if scores is None or budgets is None:
                scores, budgets = keys.new_zeros(keys.shape[:3], dtype=torch.float32), lengths
            # Budgets made on a GPU stay there: what they add up to is known here.
            capacity = None if budgets.is_cpu else sum(plan.row_counts) + budgets.numel() * reserve
            kept = lkv_ext.evict(
                keys,
                values,
                scores,
                budgets,
                lengths=lengths,
                starts=length - lengths,
                sink=plan.sink,
                window=plan.window,
                capacity=capacity,
                reserve=reserve,
                companions=sums,
            )
            tail = min(self.token_counts, default=0) if everything else 0
            self.rows = lkv_ext.RaggedCache(kept, length, free=reserve, tail=tail)
            self.keys = self.values = None
        elif scores is not None and budgets is not None:
            packed = self.rows.packed(scores)
            if sums:
                each = [self.rows.packed(part) for part in sums[0].unbind(-1)]
                self.rows.companions = (torch.stack(each, -1),)
            self.rows.evict(packed, budgets, sink=plan.sink, window=plan.window, reserve=reserve)
        else:
            self.due = False
            return
        if plan.carried is not None:
            self.carried_heads = plan.carried.heads
        self.row_counts, self.due = plan.row_counts, False
        if not everything:
            self.evicted, self.evictions = self.get_seq_length(), self.evictions + 1

    @keeps_tensors
    def hide(self, leaving: Tensor, plan: EvictionPlan) -> None:
        """Evicts the rows of tokens that a mask hides from now on: bool `[B, L]`, by position; `plan` has the rest."""
        due = self.due
        self.apply(plan)
        self.token_counts = [*map(sub, self.token_counts, leaving.sum(1).tolist())]
        self.due = due
        self.observations.hide(leaving)
