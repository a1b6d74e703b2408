"""What the layers of one cache share while a call runs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from lkv.hf import attention
from lkv.hf.settings import Settings

if TYPE_CHECKING:
    from lkv.hf.layer import RaggedLayer


class Session:
    """The settings, the layer whose keys are on their way from `update` to attention, and the padding of the call."""

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings = settings
        self.model = model
        self.closed = False
        self.waiting: int | None = None
        self._padding: tuple[weakref.ref[Tensor] | None, list[int] | None] = (None, None)

    def expect_idle(self) -> None:
        """Nothing may be on the way any more when the next keys come."""
        waiting, self.waiting = self.waiting, None
        if self.closed:
            raise ValueError("lkv.Cache: expected an open cache, got one that was closed")
        if waiting is not None:
            raise ValueError(
                f"lkv.Cache: expected layer {waiting} of {self.model} to attend through transformers' "
                "AttentionInterface, got keys that never came there: was the model's attention changed, or is this "
                "the cache of another model?"
            )

    def hand_over(self, layer: RaggedLayer) -> None:
        """A layer's keys go to the model's attention function."""
        self.waiting = layer.index

    def taken_over(self) -> None:
        self.waiting = None

    def real_tokens(self, mask: Tensor | None, batch: int, count: int) -> list[int] | None:
        """`attention.real_tokens`, read once for all layers of a call: they are given the same mask."""
        if mask is None:
            return None
        known, valid = self._padding
        if not isinstance(mask, Tensor) or known is None or known() is not mask:
            valid = attention.real_tokens(mask, batch, count)
            self._padding = (weakref.ref(mask), valid)
        return valid
