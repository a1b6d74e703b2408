"""What a forward of the model does to a cache: it begins, its layers begin and end, and it ends or leaves no trace."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from lkv.hf import masks, planning
from lkv.hf.attention import NOTE, check_arguments, logits_of
from lkv.hf.call import NOT_CAUSAL, Call, OtherSnapshot
from lkv.hf.history import History
from lkv.hf.layer import RaggedLayer
from lkv.hf.planning import EvictionPlan
from lkv.hf.routing import Route
from lkv.hf.settings import Settings
from lkv.hf.versions import AttentionModule, HFCache, outside_graphs, own_layers, stage_of_generate
from lkv_ext.shared import keeps_tensors


class Calls(HFCache):
    """Between `begin_call` and `end_call` every layer is given new keys by `update`, and its queries by `attend`.

    A call counts once its forward is done. One that fails before leaves nothing behind: all layers are restored. What
    does not come back are rows of an earlier turn that the failed call had evicted already: such a cache refuses to go
    on.

    Attributes:
        settings: how much is kept. readers: by layer that is evicted, the layers that attend to its keys.
        history: what the layers share about the tokens so far.
        call: the forward that is under way.
        broken: the layer that could not be restored after a call that failed.
        explicit: `prefill` was used: what is outside of it is no prompt.
        token_by_token: all tokens so far came one by one, outside of `prefill` and `generate`.
        outer_mask: the mask that a model around the decoder was given.
    """

    is_lkv_cache = True  # by which the hooks know it

    def _make(
        self, config: PretrainedConfig, settings: Settings, model: str, readers: dict[int, tuple[int, ...]]
    ) -> None:
        """All layers, empty; `model`: the name of its class."""
        self._config, self.settings, self.model, self.readers = config, settings, model, readers
        self.history = History()
        self.outer_mask: Tensor | None = None
        self.in_prefill = False
        self._forget()
        ranks = {i: (rank, len(readers)) for rank, i in enumerate(sorted(readers))}
        super().__init__(
            layers=[
                RaggedLayer(settings, self.history.rotations, i, ranks[i]) if i in readers else layer
                for i, layer in enumerate(own_layers(config))
            ]
        )

    def _forget(self) -> None:
        self.call: Call | None = None
        self.broken: int | None = None
        self.token_by_token = False
        self.explicit = self.in_prefill
        self.history.reset()

    @property
    def ragged(self) -> list[RaggedLayer]:
        """The layers that are evicted."""
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    @property
    def _length(self) -> int:
        """Tokens so far, hidden and evicted ones included."""
        layer = self.layers[next(iter(self.readers))]
        return layer.get_seq_length() if isinstance(layer, RaggedLayer) else 0

    # A call, from the hooks of `lkv.hf.routing`.

    def repeated(self, count: int, positions: Tensor | None) -> int:
        """How many of the tokens of a call have come before.

        Assisted decoding of transformers 5 begins with all tokens, those that a cache has seen included. Appended twice
        they would be wrong without an error, in transformers' own cache as well.
        """
        seen = self._length
        if not 0 < seen < count or positions is None or stage_of_generate() != "first draft":
            return 0
        return seen if int(positions.min()) == 0 else 0

    def begin_call(self, route: Route, batch: int, count: int, mask: masks.Mask) -> None:
        """Begins with `count` new tokens. What the mask hides of earlier ones leaves the rows for good.

        Raises:
            ValueError, TypeError: for a mask that cannot be followed, and a cache that cannot go on; nothing has
                changed then.
        """
        self._expect_idle()
        seen, history = self._length, self.history
        visible = masks.read(mask, self.outer_mask, history.hidden, batch, seen, count)
        if not visible.causal and any(layer.rows is not None for layer in self.ragged):
            raise ValueError(NOT_CAUSAL)
        leaving = history.newly_hidden(visible, batch, seen, mask is not None or self.outer_mask is not None)
        call = Call(route, batch, count, seen, visible)
        call.classify(
            stage_of_generate(),
            within_prefill=self.in_prefill if self.explicit else None,
            token_by_token=seen == 0 or self.token_by_token,
        )
        if call.token_by_token and seen == 1 and self.settings.chunks == "last":
            warnings.warn(
                "lkv.Cache: a prompt that comes token by token has no end that chunks='last' could see, and is evicted "
                "after every token: wrap it in `with cache.prefill()`",
                stacklevel=2,
            )
        if leaving is not None:
            self._hide(leaving)
        cap = self.settings.cap
        if not call.prompt and cap is not None:
            self._evict_for_cap(cap, count)
        self.call = call

    def end_call(self, done: bool) -> None:
        """The forward is over; `done`: it has a result."""
        call = self.call
        if call is None or call.thread != threading.get_ident():
            return
        try:
            if done:
                call.check_complete(self.readers, self.model)
                if call.due:
                    self._evict_due(call, self.ragged)
                self.token_by_token = call.token_by_token
                self.history.extend(call.visible, call.padding, call.batch, call.seen, call.count)
                call.done = True
        finally:
            self.settle()

    @outside_graphs
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values `[B, H, n, D]` of one layer; returned is what its attention shall be given."""
        layer = self._begin_layer(layer_idx)
        if layer is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = layer.update(key_states, value_states)
        setattr(keys, NOTE, (self, layer))
        return keys, values

    @outside_graphs
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers': of layers with a recurrent state, which are its own."""
        self._begin_layer(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def update_recurrent_state(  # type: ignore[override]  # for every version of transformers
        self, states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As transformers': of layers with a recurrent state, which are its own."""
        self._begin_layer(layer_idx)
        return super().update_recurrent_state(states, layer_idx, *args, **kwargs)

    def attend(
        self,
        layer: RaggedLayer,
        own: str,
        module: AttentionModule,
        states: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, None]:
        """Attention to a layer: `[B, n, Hq, Dv]`. Behind the last module that reads it, its eviction, if it is time.

        Args:
            own: the model's own attention. kwargs: its arguments.
            states: queries `[B, Hq, n, D]`, and the keys and values that `update` returned.

        Raises:
            ValueError: where that is not expected (any more).
        """
        call, reader = self.call, module.layer_idx
        waiting = None if call is None else call.waiting.get(layer.index)
        if call is None or waiting is None or reader not in waiting:
            raise ValueError(
                f"lkv.Cache: expected layers {list(self.readers[layer.index])} of {self.model} to attend once each to "
                f"the keys of layer {layer.index} in the call that they came in, got layer {reader} once more"
            )
        waiting.remove(reader)
        check_arguments(module, states[0], mask, kwargs)
        out = layer.attend(call, own, module, states, mask, logits_of(own, states[0], kwargs), kwargs)
        # All else is behind the call, when all layers are planned for before any is evicted.
        if call.prompt and not waiting and self.settings.policy.scope != "model" and not self._waits(call):
            if self.settings.policy.scope == "layer":
                self._evict_due(call, [layer])
            else:
                self._apply(call.cascade.plan(layer, self.settings))
        return out, None

    def settle(self) -> None:
        """A call that did not end has not been."""
        call, self.call = self.call, None
        if call is None:
            return
        call.route.close()
        if call.done:
            return
        while call.before:
            index, before = call.before.popitem()
            if not before.restore():
                self.broken = index
        for layer in self.ragged:
            layer.observations.drop_captured()
        self.history.rotations.drop_empty()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical: evicted tokens count, those of a call that is under way do not."""
        before = None if self.call is None else self.call.before.get(layer_idx)
        length = None if before is None else before.length
        return super().get_seq_length(layer_idx) if length is None else length

    # When to evict.

    @contextmanager
    def _prefill(self) -> Iterator[None]:
        outermost, self.in_prefill, self.explicit = not self.in_prefill, True, True
        try:
            yield
        finally:
            self.in_prefill = not outermost
        if outermost:
            self.settle()
            self.evict_due()

    def evict_due(self) -> None:
        """Evicts what a prompt has left, with no token to follow yet."""
        self._evict([layer for layer in self.ragged if layer.due], self.settings)

    def _evict_due(self, call: Call, layers: Sequence[RaggedLayer]) -> None:
        """Behind a call, or a layer of it: what has come with it as a prompt, or was left before a token."""
        if self._waits(call):
            return
        layers = [layer for layer in layers if layer.due]
        if layers:
            self._evict(layers, self.settings)

    def _waits(self, call: Call) -> bool:
        """Whether more of the prompt may come before anything is evicted, or tokens may be cropped."""
        wait = self.settings.chunks == "last" and not call.token_by_token
        return call.draft or (call.prompt and wait) or (self.in_prefill and wait)

    def _evict_for_cap(self, cap: int, count: int) -> None:
        """Makes space below the cap for `count` tokens that were generated."""
        settings = self.settings
        packed = [layer for layer in self.ragged if layer.rows is not None]
        full = planning.over_cap(packed, settings.policy, cap, count)
        if full:
            self._evict(full, settings, max(cap - max(settings.interval, count), 1))

    def _evict(
        self,
        layers: Sequence[RaggedLayer],
        settings: Settings,
        rows: int | None = None,
        scores: Sequence[Tensor] | None = None,
    ) -> None:
        """All that may fail first: no layer is evicted before all are planned for."""
        self._apply(list(zip(layers, planning.plan(layers, settings, rows, scores), strict=True)))

    @staticmethod
    def _apply(plans: Sequence[tuple[RaggedLayer, EvictionPlan]]) -> None:
        for layer, plan in plans:
            layer.apply(plan)
            if plan.scores is not None:
                layer.observations.evicted()
            plan.scores = None  # a layer's are gone with its rows

    @keeps_tensors
    def _hide(self, leaving: Tensor) -> None:
        """Takes tokens out of the rows of all layers: bool `[B, L]`, in the order in which they came."""
        at = self.history.hide(leaving)
        for layer in self.ragged:
            if layer.token_counts:
                layer.hide(at, planning.without(layer, at))

    # Within a call.

    def _begin_layer(self, index: int) -> RaggedLayer | None:
        """The layer, to which new keys or a new recurrent state come; None: one of transformers' own.

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
        layer = self.layers[index]
        if isinstance(layer, RaggedLayer):
            call.before[index] = layer.snapshot()
            call.waiting[index] = list(self.readers[index])
            return layer
        if index not in call.before:
            call.before[index] = OtherSnapshot(layer)
        return None

    def _expect_idle(self) -> None:
        if self.call is not None:
            if self.call.thread != threading.get_ident():
                raise ValueError(
                    "lkv.Cache: expected one call at a time, got one while another thread has not finished"
                )
            self.settle()  # of a call that was interrupted
        if self.broken is not None:
            raise ValueError(
                f"lkv.Cache: expected a cache that has all its rows, got one of which layer "
                f"{self.broken} had been evicted when its last call failed: reset it"
            )
