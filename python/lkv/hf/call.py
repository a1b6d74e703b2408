"""One forward of a decoder with a cache of ours: its tokens, its masks, and what the layers were before it."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

from torch import Tensor

from lkv.hf import masks
from lkv.hf.cascade import Cascade
from lkv.hf.routing import Route
from lkv.hf.versions import CacheLayerMixin, HFLayer, is_appended_by_copy


class LayerBefore(Protocol):
    """A layer before a call."""

    @property
    def length(self) -> int | None:
        """Tokens in it; None in a layer that counts none."""
        ...

    def restore(self) -> bool:
        """Takes back what came since; False where that is gone."""
        ...


class Call:
    """One forward of the decoder, from its beginning to its end.

    Attributes:
        count: new tokens of every sequence. seen: tokens before them.
        prompt: its tokens are of a prompt, which is evicted by the settings.
        token_by_token: see `Calls`, with the token of this call.
        draft: its tokens are to be verified, and may be cropped afterwards: nothing is evicted before.
        leaves_prompt: there is a prompt among its tokens, which is due from now on.
        due: some layer has something to evict.
        done: it has ended, and is not taken back any more.
        visible, padding: what the mask shows of all tokens, and which of the new ones are padding.
        before: snapshots of the layers that it has reached.
        cascade: what is known of the layers so far, where they shrink as later ones come.
        waiting: for every layer whose keys have come, the layers that have not attended to them yet.
    """

    def __init__(self, route: Route, batch: int, count: int, seen: int, visible: masks.Visible) -> None:
        self.route, self.batch, self.count, self.seen, self.visible = route, batch, count, seen, visible
        self.thread = threading.get_ident()
        self.prompt = self.token_by_token = self.draft = self.leaves_prompt = self.due = self.done = False
        hidden = visible.hidden
        self.padding = None if hidden is None else masks.PaddingInfo.of(hidden[:, seen:])
        self.before: dict[int, LayerBefore] = {}
        self.waiting: dict[int, list[int]] = {}
        self.cascade: Cascade[Any] = Cascade()
        self._checked: weakref.ref[Tensor] | None = None

    def classify(self, stage: str | None, within_prefill: bool | None, token_by_token: bool) -> None:
        """Whether its tokens are of a prompt, a draft, or generated.

        Args:
            stage: of `generate`, see `stage_of_generate`.
            within_prefill: of `lkv.Cache.prefill`; None where it was never used.
            token_by_token: all tokens before came one by one, outside of both, or there are none.
        """
        self.draft = stage in ("first draft", "draft")
        self.token_by_token = token_by_token and self.count == 1 and stage is None and within_prefill is None
        if within_prefill is not None:
            self.prompt = within_prefill
        elif not self.draft:
            self.prompt = self.count > 1 or stage == "prompt" or self.token_by_token
        self.leaves_prompt = self.prompt or (stage == "first draft" and within_prefill is None)

    def check_complete(self, readers: dict[int, tuple[int, ...]], model: str) -> None:
        """Raises ValueError where keys have not come, or were not attended to by all their readers."""
        for index in readers:
            if self.waiting.get(index) != []:
                raise ValueError(
                    f"lkv.Cache: expected layer {index} of {model} to hand its keys to the cache and to attend to them "
                    "through transformers' AttentionInterface, got a call in which it did not"
                )

    def check_mask(self, mask: Tensor | None) -> None:
        """Raises ValueError for a mask that packed rows cannot follow, looked at once for all layers of a call."""
        if self.count == 1 or not isinstance(mask, Tensor) or (self._checked is not None and self._checked() is mask):
            return
        if not masks.is_causal(mask, self.batch, self.count):
            raise ValueError(NOT_CAUSAL)
        self._checked = weakref.ref(mask)


NOT_CAUSAL = (
    "lkv.Cache: expected a causal mask, but for hidden tokens, where rows are packed, as every head has rows of its "
    "own: before the first eviction any mask is followed (chunks='last'; cache.prefill() marks the prompt)"
)


class OtherSnapshot:
    """A layer of transformers before a call: its attributes, if new tokens make new tensors there."""

    def __init__(self, layer: HFLayer) -> None:
        self.layer = layer
        self.length = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else None
        self.state = dict(vars(layer)) if is_appended_by_copy(layer) else None

    def restore(self) -> bool:
        if self.state is not None:
            vars(self.layer).clear()
            vars(self.layer).update(self.state)
        return self.state is not None
