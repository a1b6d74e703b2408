"""What the layers of a cache share about all tokens so far: which are hidden, where padding moved them, rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from lkv.hf.masks import PaddingInfo, Visible
from lkv.hf.token_log import Rotations
from lkv_ext.shared import keeps_tensors


class History:
    """All tokens of all sequences, in the order in which they came.

    Attributes:
        hidden: bool `[B, L]`, tokens that the masks so far have hidden; None: none.
        places: int64 `[B, L]`, where each of them is among the rows' positions, if padding moved some.
        rotations: what keys were rotated by, where policies need keys before RoPE.
    """

    def __init__(self) -> None:
        self.rotations = Rotations()
        self.reset()

    def reset(self) -> None:
        self.hidden: Tensor | None = None
        self.places: Tensor | None = None
        self.rotations.clear()

    def newly_hidden(self, visible: Visible, batch: int, seen: int, given: bool) -> Tensor | None:
        """bool `[B, seen]`, what a mask hides of earlier tokens, if anything; `given`: there is a mask.

        Raises:
            ValueError: for a mask that shows hidden tokens again, and for none after one that hid some.
        """
        if visible.hidden is None and self.hidden is None:
            return None
        if visible.hidden is None and not given:
            raise ValueError(
                "lkv.Cache: expected attention_mask of all tokens, as earlier ones hid some, got none: pass it with "
                "every later call"
            )
        past = self.hidden if self.hidden is not None else torch.zeros(batch, seen, dtype=torch.bool, device="cpu")
        now = past & False if visible.hidden is None else visible.hidden[:, :seen]
        past = past.to(now.device)
        again, newly = torch.stack([(past & ~now).any(), (now & ~past).any()]).tolist()
        if again:
            raise ValueError(
                "lkv.Cache: expected tokens that attention_mask has once hidden to stay so, as their rows are gone, "
                "got a mask that shows some again"
            )
        return now & ~past if newly else None

    def hide(self, leaving: Tensor) -> Tensor:
        """Hides tokens for good: bool `[B, L]`, in the order in which they came; returned by position of their rows."""
        self.hidden = leaving.clone() if self.hidden is None else self.hidden | leaving
        if self.places is None:
            return leaving
        return torch.zeros_like(leaving).scatter_(1, self.places.to(leaving.device), leaving)

    def extend(self, visible: Visible, padding: PaddingInfo | None, batch: int, seen: int, count: int) -> None:
        """Adds the `count` tokens of a call to the first `seen`."""
        if visible.hidden is None and self.places is None:  # nearly always, and no tensor is made then
            self.hidden = None
        else:
            self._extend(visible, padding, batch, seen, count)

    @keeps_tensors
    def _extend(self, visible: Visible, padding: PaddingInfo | None, batch: int, seen: int, count: int) -> None:
        self.hidden = None if visible.hidden is None else visible.hidden.clone()
        order, old = None if padding is None else padding.order, self.places
        if order is not None:
            new = order.argsort(1)
        elif old is not None:
            new = torch.arange(count, device=old.device).expand(batch, -1)
        else:
            return
        if old is None:
            old = torch.arange(seen, device=new.device).expand(batch, -1)
        self.places = torch.cat([old, new + seen], 1)

    @keeps_tensors
    def select(self, indices: Tensor) -> None:
        """Sequences `indices`, in that order."""
        self.rotations.select(indices)
        self.hidden, self.places = (None if t is None else t[indices.to(t.device)] for t in (self.hidden, self.places))
        if self.hidden is not None and not bool(self.hidden.any()):
            self.hidden = None

    def crop(self, tokens: int, length: int) -> None:
        """Forgets the last `tokens` of `length` tokens. The layers crop the rotations, each those that it reads."""
        if tokens:
            self.hidden, self.places = (
                None if t is None else t[:, : t.shape[1] - tokens] for t in (self.hidden, self.places)
            )
        if tokens == length:
            self.rotations.clear()
