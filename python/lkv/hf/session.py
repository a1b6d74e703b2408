"""What the layers of one cache share: its settings, what is hidden of its tokens, and the call that is under way."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lkv.hf import masks, planning
from lkv.hf.call import NOT_CAUSAL, Call, restore, snapshot
from lkv.hf.layer import RaggedLayer
from lkv.hf.routing import Route
from lkv.hf.settings import Settings
from lkv.hf.token_log import Rotary
from lkv.hf.versions import CacheLayerMixin, stage_of_generate
from lkv_ext.shared import keeps_tensors


class Session:
    """Between `begin` and `end` the layers `enter` with new keys and `leave` when all that read them have attended.

    A call counts once its forward is done. One that fails before leaves nothing behind: all layers are restored. What
    does not come back are rows of an earlier turn that the failed call had evicted already: such a cache refuses to go
    on.

    Attributes:
        hidden: bool `[B, L]`, tokens that the masks so far have hidden, in the order in which they came; None: none.
        places: int64 `[B, L]`, where each of them is among the rows' positions, if padding moved some.
        explicit: `prefill` was used: what is outside of it is no prompt.
        token_by_token: all tokens so far came one by one, outside of `prefill` and `generate`.
    """

    def __init__(self, settings: Settings, model: str, readers: dict[int, tuple[int, ...]]) -> None:
        self.settings, self.model, self.readers = settings, model, readers
        self.outer_mask: Tensor | None = None
        self.in_prefill = self.explicit = False
        self._layers: list[weakref.ref[CacheLayerMixin]] = []
        self.reset()

    def reset(self) -> None:
        self.call: Call | None = None
        self.broken: int | None = None  # the layer that could not be restored
        self.hidden: Tensor | None = None
        self.places: Tensor | None = None
        self.rotaries: list[Rotary] = []
        self.token_by_token = False
        self.explicit = self.in_prefill

    def attach(self, layers: Sequence[CacheLayerMixin]) -> None:
        """All layers of the cache. They know the session, so it must not keep them alive."""
        self._layers = [weakref.ref(layer) for layer in layers]

    @property
    def ragged(self) -> list[RaggedLayer]:
        return [layer for layer in (ref() for ref in self._layers) if isinstance(layer, RaggedLayer)]

    @property
    def length(self) -> int:
        """Tokens so far, hidden and evicted ones included."""
        return self._layers[next(iter(self.readers))]().get_seq_length()

    # A call.

    def repeated(self, count: int, positions: Tensor | None) -> int:
        """How many of the tokens of a call have come before.

        Assisted decoding of transformers 5 begins with all tokens, those that a cache has seen included. Appended twice
        they would be wrong without an error, in transformers' own cache as well.
        """
        seen = self.length
        if not 0 < seen < count or positions is None or stage_of_generate() != "draft":
            return 0
        return seen if int(positions.min()) == 0 else 0

    def begin(self, route: Route, batch: int, count: int, mask: object) -> None:
        """Of `count` new tokens. What the mask hides of earlier ones leaves the rows, whatever becomes of the call.

        Raises:
            ValueError, TypeError: for a mask that cannot be followed, and a cache that cannot go on; nothing has
                changed then.
        """
        self._expect_idle()
        seen = self.length
        visible = masks.read(mask, self.outer_mask, self.hidden, batch, seen, count)
        if not visible.causal and any(layer.rows is not None for layer in self.ragged):
            raise ValueError(NOT_CAUSAL)
        leaving = self._newly_hidden(visible, mask, batch, seen)
        call = Call(route, batch, count, visible)
        if visible.hidden is not None:
            call.padding = masks.PaddingInfo.of(visible.hidden[:, seen:])
        self._classify(call, seen)
        if leaving is not None:
            self._hide(leaving)
        if not call.prompt:
            self._make_room(count)
        self.call = call

    def end(self, done: bool) -> None:
        """The forward is over; `done`: it has a result."""
        call = self.call
        if call is None or call.thread != threading.get_ident():
            return
        try:
            if done:
                self._check_pairs(call)
                if call.due:
                    self._evict_due(self.ragged)
                self._remember(call)
                call.done = True
        finally:
            self.settle()

    def _check_pairs(self, call: Call) -> None:
        for index in self.readers:
            if call.waiting.get(index) != []:
                raise ValueError(
                    f"lkv.Cache: expected layer {index} of {self.model} to hand its keys to the cache and to attend to "
                    "them through transformers' AttentionInterface, got a call in which it did not"
                )

    def enter(self, index: int) -> None:
        """New keys, or a new recurrent state, come to a layer.

        Raises:
            ValueError: outside of a call, and where the layer has come before in this one.
        """
        call = self.call
        if call is None:
            raise ValueError(
                "lkv.Cache: expected keys of a forward of the decoder that the cache was made for, got some of another "
                f"call: was {self.model} copied, or its forward called other than as a module? cache.attach(model) "
                "prepares a model"
            )
        if index in call.waiting:
            raise ValueError(f"lkv.Cache: expected keys of layer {index} once in a call, got them twice")
        if index not in call.before:
            call.before[index] = snapshot(self._layers[index]())
        if index in self.readers:
            call.waiting[index] = list(self.readers[index])

    def attended(self, index: int, reader: int) -> bool:
        """Layer `reader` attends to the rows of layer `index`; True if it is the last.

        Raises:
            ValueError: where that is not expected (any more).
        """
        waiting = [] if self.call is None else self.call.waiting.get(index, [])
        if reader not in waiting:
            raise ValueError(
                f"lkv.Cache: expected layers {list(self.readers[index])} of {self.model} to attend once each to the "
                f"keys of layer {index} in the call that they came in, got layer {reader} once more"
            )
        waiting.remove(reader)
        return not waiting

    def leave(self, layer: RaggedLayer) -> None:
        """All have attended to a layer of a piece of a prompt: it is evicted at once where no other layer has a say.

        All else is behind the call, when all layers are chosen for before any is evicted.
        """
        if self.settings.policy.scope == "layer":
            self._evict_due([layer])

    def settle(self) -> None:
        """A call that did not come to its end has not been."""
        call, self.call = self.call, None
        if call is None:
            return
        call.route.close()
        if call.done:
            return
        while call.before:
            index, before = call.before.popitem()
            if not restore(self._layers[index](), before):
                self.broken = index
        for layer in self.ragged:
            layer.observations.captured = None
        self.rotaries = [rotary for rotary in self.rotaries if rotary.cos.length]

    def length_before(self, index: int) -> int | None:
        """Of a layer that the call has reached: its length without the tokens of the call."""
        before = None if self.call is None else self.call.before.get(index)
        return None if before is None else before.length

    # Between calls.

    @contextmanager
    def prefill(self) -> Iterator[None]:
        outermost, self.in_prefill, self.explicit = not self.in_prefill, True, True
        try:
            yield
        finally:
            self.in_prefill = not outermost
        if outermost:
            self.settle()
            self.evict_due()

    def evict_due(self) -> None:
        """What a prompt has left, with no token to follow yet."""
        planning.evict([layer for layer in self.ragged if layer.due], self.settings)

    def rotary(self, cos: Tensor) -> Rotary:
        """The one of the layers that have come with these very rotations, or a new one."""
        for rotary in self.rotaries:
            if rotary.last is not None and rotary.last() is cos:
                return rotary
        self.rotaries.append(Rotary())
        return self.rotaries[-1]

    def load_rotaries(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.rotaries = []
        for cos, sin in parts:
            rotary = Rotary()
            rotary.push(0, cos, sin, None)
            self.rotaries.append(rotary)

    @keeps_tensors
    def select(self, indices: Tensor) -> None:
        """Before all layers go on with the sequences `indices`: what they share does.

        Raises:
            ValueError: for indices of sequences that are not there; nothing has changed then.
        """
        self.settle()
        order, batch = indices.tolist(), len(self.ragged[0].token_counts)
        if batch and not all(type(b) is int and 0 <= b < batch for b in order):
            raise ValueError(f"lkv.Cache: expected indices of sequences in [0, {batch}), got {order}")
        for rotary in self.rotaries:
            rotary.select(indices)
        self.hidden, self.places = (None if t is None else t[indices.to(t.device)] for t in (self.hidden, self.places))
        if self.hidden is not None and not bool(self.hidden.any()):
            self.hidden = None

    def crop(self, tokens: int) -> None:
        """Before all layers forget the last tokens: what they share does."""
        if tokens:
            self.hidden, self.places = (
                None if t is None else t[:, : t.shape[1] - tokens] for t in (self.hidden, self.places)
            )
        if tokens == self.length:
            self.rotaries = []

    # Within a call.

    def _expect_idle(self) -> None:
        if self.call is not None:
            if self.call.thread != threading.get_ident():
                raise ValueError(
                    "lkv.Cache: expected one call at a time, got one while another thread has not finished"
                )
            self.settle()  # of a call that was interrupted
        if self.broken is not None:
            raise ValueError(
                "lkv.Cache: expected a cache whose calls have come to their end, got one of which layer "
                f"{self.broken} had been evicted when its last call failed: reset it"
            )

    def _newly_hidden(self, visible: masks.Visible, mask: object, batch: int, seen: int) -> Tensor | None:
        """bool `[B, seen]`, what a mask hides of earlier tokens, if anything."""
        if visible.hidden is None and self.hidden is None:
            return None
        if visible.hidden is None and mask is None and self.outer_mask is None:
            raise ValueError(
                "lkv.Cache: expected attention_mask of all tokens, as earlier ones hid some, got none: every later "
                "call needs it"
            )
        past = self.hidden if self.hidden is not None else torch.zeros(batch, seen, dtype=torch.bool)
        now = past & False if visible.hidden is None else visible.hidden[:, :seen]
        past = past.to(now.device)
        again, newly = torch.stack([(past & ~now).any(), (now & ~past).any()]).tolist()
        if again:
            raise ValueError(
                "lkv.Cache: expected tokens that attention_mask has once hidden to stay so, as their rows are gone, "
                "got a mask that shows some again"
            )
        return now & ~past if newly else None

    def _classify(self, call: Call, seen: int) -> None:
        stage = stage_of_generate()
        if call.count == 1 and stage is None and not self.explicit:
            call.token_by_token = seen == 0 or self.token_by_token
            if call.token_by_token and seen == 1 and self.settings.chunks == "last":
                warnings.warn(
                    "lkv.Cache: a prompt that comes token by token has no end that chunks='last' could see, and is "
                    "evicted behind every token: wrap it in `with cache.prefill()`",
                    stacklevel=2,
                )
        call.draft = stage == "draft"
        if self.explicit:
            call.prompt = self.in_prefill
        elif not call.draft:
            call.prompt = call.count > 1 or stage == "prompt" or call.token_by_token

    @keeps_tensors
    def _hide(self, leaving: Tensor) -> None:
        """Takes tokens out of the rows of all layers: bool `[B, L]`, in the order in which they came."""
        at = leaving
        if self.places is not None:
            at = torch.zeros_like(leaving).scatter_(1, self.places.to(leaving.device), leaving)
        planning.hide([layer for layer in self.ragged if layer.token_counts], at, self.settings.reserve)
        self.hidden = leaving.clone() if self.hidden is None else self.hidden | leaving

    @keeps_tensors
    def _remember(self, call: Call) -> None:
        self.token_by_token = call.token_by_token
        self.hidden = None if call.visible.hidden is None else call.visible.hidden.clone()
        order = None if call.padding is None else call.padding.order
        if order is None and self.places is None:
            return
        seen = self.length - call.count
        device = (order if order is not None else self.places).device
        new = torch.arange(call.count, device=device).expand(call.batch, -1) if order is None else order.argsort(1)
        old = torch.arange(seen, device=device).expand(call.batch, -1) if self.places is None else self.places
        self.places = torch.cat([old, new + seen], 1)

    def _evict_due(self, layers: Sequence[RaggedLayer]) -> None:
        """Behind a call, or a layer of it: what has come with it as a prompt, or was left before a token."""
        call = self.call
        wait = self.settings.chunks == "last" and not call.token_by_token
        if call.draft or (call.prompt and wait) or (self.in_prefill and wait):
            return
        layers = [layer for layer in layers if layer.due]
        if layers:
            planning.evict(layers, self.settings)

    def _make_room(self, count: int) -> None:
        """Before tokens that were generated: what the cap asks for."""
        settings = self.settings
        if settings.cap is None:
            return
        layers = [layer for layer in self.ragged if layer.rows is not None]
        groups = [layers] if planning.one_total(settings.policy) else [[layer] for layer in layers]
        full = [g for g in groups if g and _rows_after(g, count) > settings.cap * _heads(g)]
        if full:
            rows = max(settings.cap - max(settings.interval, count), 1)
            planning.evict([layer for group in full for layer in group], settings, rows)


def _heads(layers: Sequence[RaggedLayer]) -> int:
    return sum(layer.heads for layer in layers)


def _rows_after(layers: Sequence[RaggedLayer], count: int) -> int:
    """Rows of the fullest sequence with `count` tokens more."""
    return max(map(sum, zip(*(layer.row_counts for layer in layers), strict=True))) + count * _heads(layers)
