"""What the layers of one cache share while a call runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lkv.hf import attention, eviction
from lkv.hf.layer import RaggedLayer
from lkv.hf.settings import Settings
from lkv.hf.tape import Rotary
from lkv.hf.versions import CacheLayerMixin, is_appended_by_copy


class Session:
    """The settings, the layer whose keys are on their way from `update` to attention, the padding of the call, and how
    the layers that it has reached were before.

    A call counts once its last layer is done. One that fails before leaves nothing behind, be it in our functions, when
    all layers are restored at once, or elsewhere in the model, when they are as soon as the next call comes. What does
    not come back are rows of an earlier turn that the failed call had evicted already: such a cache refuses to go on.
    """

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings = settings
        self.model = model
        self.closed = False
        self.waiting: int | None = None
        self.broken: int | None = None  # the layer that could not be restored
        self._padding: tuple[weakref.ref[Tensor] | None, attention.Real | None] = (None, None)
        self._layers: list[weakref.ref[CacheLayerMixin]] = []
        self._before: dict[int, object] = {}  # marks of the layers that the call has reached
        self._rotaries: list[Rotary] = []

    def attach(self, layers: Sequence[CacheLayerMixin]) -> None:
        """All layers of the cache. They know the session, so it must not keep them alive."""
        self._layers = [weakref.ref(layer) for layer in layers]

    @property
    def ragged(self) -> list[RaggedLayer]:
        return [layer for layer in (ref() for ref in self._layers) if isinstance(layer, RaggedLayer)]

    # A call, layer by layer.

    def enter(self, index: int, count: int) -> None:
        """The keys of `count` new tokens come to a layer."""
        self.expect_idle()
        if index in self._before:
            self.settle()
        if self.broken is not None:
            raise ValueError(
                "lkv.Cache: expected a cache whose calls have come to their end, got one of which layer "
                f"{self.broken} had been evicted when its last call failed: reset it"
            )
        layer = self._layers[index]()
        if count == 1 and not self._before:
            self._make_room()
        self._before[index] = _mark(layer)

    def hand_over(self, layer: RaggedLayer) -> None:
        """A layer's keys go to the model's attention function."""
        self.waiting = layer.index

    def taken_over(self) -> None:
        self.waiting = None

    def leave(self, index: int) -> None:
        """A layer has all that it gets in this call: it is evicted, or all are behind the last, if it is time."""
        layer = self._layers[index]()
        if self.settings.chunks == "each" and isinstance(layer, RaggedLayer):
            together = self.settings.policy.scope == "model"
            layers = [layer] if not together else self.ragged if layer is self.ragged[-1] else []
            layers = [each for each in layers if each.due]
            if layers:
                eviction.evict(layers, self.settings)
        if index == len(self._layers) - 1:
            self._before.clear()

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

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.waiting = None
            self.settle()
            raise

    def settle(self) -> None:
        """A call that did not come to its end has not been."""
        while self._before:
            index, mark = self._before.popitem()
            if not _restore(self._layers[index](), mark):
                self.broken = index

    def length_before(self, index: int) -> int | None:
        """Of a layer that the call has reached: its length without the tokens of the call."""
        mark = self._before.get(index)
        return None if mark is None else mark.length

    def reset(self) -> None:
        self.waiting = self.broken = None
        self._before.clear()
        self._rotaries.clear()

    def rotary(self, cos: Tensor) -> Rotary:
        """The one of the layers that have come with these very rotations, or a new one."""
        for rotary in self._rotaries:
            if rotary.last is not None and rotary.last() is cos:
                return rotary
        self._rotaries.append(Rotary())
        return self._rotaries[-1]

    def select(self, indices: Tensor) -> None:
        """Before all layers go on with the sequences `indices`: what they share does."""
        self.settle()
        for rotary in self._rotaries:
            rotary.select(indices)

    def real_tokens(self, mask: Tensor | None, batch: int, count: int) -> attention.Real | None:
        """`attention.real_tokens`, read once for all layers of a call: they are given the same mask."""
        if mask is None:
            return None
        known, real = self._padding
        if not isinstance(mask, Tensor) or known is None or known() is not mask:
            real = attention.real_tokens(mask, batch, count)
            self._padding = (weakref.ref(mask), real)
        return real

    def _make_room(self) -> None:
        """Before a token that was generated: what is due behind a prompt, and what the cap asks for."""
        settings, layers = self.settings, self.ragged
        due = [layer for layer in layers if layer.due]
        if due:
            eviction.evict(due, settings)
        if settings.cap is None:
            return
        layers = [layer for layer in layers if layer.rows is not None]
        groups = [layers] if eviction.one_total(settings.policy) else [[layer] for layer in layers]
        full = [group for group in groups if group and _rows_after(group) > settings.cap * _heads(group)]
        if full:
            eviction.evict([layer for group in full for layer in group], settings, settings.cap - settings.interval)


def _heads(layers: Sequence[RaggedLayer]) -> int:
    return sum(layer.heads for layer in layers)


def _rows_after(layers: Sequence[RaggedLayer]) -> int:
    """Rows of the fullest sequence with one token more."""
    return max(map(sum, zip(*(layer.held for layer in layers), strict=True))) + _heads(layers)


class _Whole:
    """Another layer before a call: transformers' own put new tensors in the place of the old ones."""

    def __init__(self, layer: CacheLayerMixin) -> None:
        self.length = layer.get_seq_length() if isinstance(layer, CacheLayerMixin) else None
        self.state = dict(vars(layer)) if is_appended_by_copy(layer) else None


def _mark(layer: CacheLayerMixin) -> object:
    return layer.mark() if isinstance(layer, RaggedLayer) else _Whole(layer)


def _restore(layer: CacheLayerMixin, mark: object) -> bool:
    if isinstance(layer, RaggedLayer):
        return layer.restore(mark)
    if mark.state is not None:
        vars(layer).clear()
        vars(layer).update(mark.state)
    return mark.state is not None
