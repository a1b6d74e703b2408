"""One forward of a decoder with a cache of ours, and what its layers were before it."""

from __future__ import annotations

import threading
import weakref

from torch import Tensor

from lkv.hf import masks
from lkv.hf.layer import RaggedLayer
from lkv.hf.routing import Route
from lkv.hf.versions import CacheLayerMixin, is_appended_by_copy


class Call:
    """One forward of the decoder, from its beginning to its end.

    Attributes:
        prompt: its tokens are of a prompt, which is evicted as the settings say.
        token_by_token: see `Session`, with the token of this call.
        draft: its tokens are to be verified, and may be cropped behind it: nothing is evicted before.
        due: some layer has something to evict.
        done: it has come to its end, and is not taken back any more.
        visible, padding: what the mask says of all tokens, and of the new ones.
        before: snapshots of the layers that it has reached.
        waiting: of every layer whose keys are on their way, the layers that have to attend to them yet.
    """

    def __init__(self, route: Route, batch: int, count: int, visible: masks.Visible) -> None:
        self.route, self.batch, self.count, self.visible = route, batch, count, visible
        self.thread = threading.get_ident()
        self.prompt = self.token_by_token = self.draft = self.due = self.done = False
        self.padding: masks.PaddingInfo | None = None
        self.before: dict[int, object] = {}
        self.waiting: dict[int, list[int]] = {}
        self._checked: weakref.ref[Tensor] | None = None

    def check_mask(self, mask: Tensor | None) -> None:
        """Raises ValueError for a mask that packed rows cannot follow, looked at once for all layers of a call."""
        if self.count == 1 or not isinstance(mask, Tensor) or (self._checked is not None and self._checked() is mask):
            return
        if not masks.is_causal(mask, self.batch, self.count):
            raise ValueError(NOT_CAUSAL)
        self._checked = weakref.ref(mask)


NOT_CAUSAL = (
    "lkv.Cache: expected a causal mask, but for hidden tokens, where rows are packed: every head has other rows. "
    "Before the first eviction any mask is followed (chunks='last'; cache.prefill() says when the prompt ends)"
)


class Whole:
    """Another layer before a call: transformers' own put new tensors in the place of the old ones."""

    def __init__(self, layer: CacheLayerMixin) -> None:
        self.length = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else None
        self.state = dict(vars(layer)) if is_appended_by_copy(layer) else None


def snapshot(layer: CacheLayerMixin) -> object:
    return layer.snapshot() if isinstance(layer, RaggedLayer) else Whole(layer)


def restore(layer: CacheLayerMixin, before: object) -> bool:
    if isinstance(layer, RaggedLayer):
        return layer.restore(before)
    if before.state is not None:
        vars(layer).clear()
        vars(layer).update(before.state)
    return before.state is not None
