"""`lkv.Cache`: a transformers cache that evicts, for `generate` and for the model's own `forward`."""

from __future__ import annotations

import copy
import weakref

from transformers import PreTrainedModel

from lkv import policies
from lkv.hf.layer import RaggedLayer
from lkv.hf.routing import route
from lkv.hf.session import Session
from lkv.hf.settings import Settings
from lkv.hf.versions import HFCache, is_full_attention, own_layers


class Cache(HFCache):
    """A cache of which every head of every full-attention layer keeps the rows that a policy chose, and no others.

        cache = lkv.Cache(model, "snapkv", retention=0.15)
        model.generate(**inputs, past_key_values=cache)

    A prompt is attended to in full by the model's own attention, layer by layer; each layer is evicted before the next
    one is reached. Then new tokens are appended in place and attend to what is left, at their logical positions. A
    later prompt is appended, attends, and the layer is evicted again out of old and new rows. Batches may be padded on
    the left. Sliding-window and other layers are transformers' own.

    While a cache of it is alive, the model runs under our attention's name, which is its own attention for all other
    caches; `close`, leaving `with`, or the end of the last cache restores it.

    Args:
        model: a transformers model whose attention goes through its `AttentionInterface`.
        policy: a name ("snapkv", "adakv", "streaming_llm") or a policy object.
        retention: fraction of the logical length (tokens without padding) to keep, in (0, 1]; or
        budget: rows to keep; both per head, on average over a layer's heads.
        chunks: with a prompt in several calls, "each" evicts after every one, so that memory is bounded; "last" at the
            first single token that follows, so that all of the prompt's chunks were attended to in full.
        cap: rows per head, on average over a layer, beyond which decoding does not go: when they are reached,
            `interval` rows are evicted, however long it goes on. Without a cap generated tokens are kept.
        interval: default: an eighth of the cap.
        reserve: rows of slack behind every head, into which tokens are written in place.

    Raises:
        ValueError, TypeError: for arguments out of range, and a model whose attention cannot be routed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | policies.Policy = "snapkv",
        *,
        retention: float | None = None,
        budget: int | None = None,
        chunks: str = "each",
        cap: int | None = None,
        interval: int | None = None,
        reserve: int = 64,
    ) -> None:
        if interval is None:
            interval = max(1, (cap or 0) // 8)
        settings = Settings(policies.get(policy), retention, budget, chunks, cap, interval, reserve)
        config, self._route = route(model)
        self._session = Session(settings, type(model).__name__)
        layers = [
            RaggedLayer(self._session, i) if is_full_attention(layer) else layer
            for i, layer in enumerate(own_layers(config))
        ]
        if not any(isinstance(layer, RaggedLayer) for layer in layers):
            raise ValueError("lkv.Cache: expected a model with full-attention layers, got none")
        super().__init__(layers=layers)
        self._begin()

    def _begin(self) -> None:
        self._route.acquire()
        self._close = weakref.finalize(self, self._route.release)

    def close(self) -> None:
        """Gives the model its own attention back, unless another cache still needs ours. The rows stay."""
        self._session.closed = True
        self._close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, object]) -> Cache:
        """A cache that goes on from here by itself, on the same model."""
        other = object.__new__(type(self))
        memo[id(self)] = other
        for name, value in vars(self).items():
            setattr(other, name, value if name in ("_route", "_close") else copy.deepcopy(value, memo))
        other._begin()
        return other

    @property
    def settings(self) -> Settings:
        return self._session.settings

    @property
    def ragged(self) -> list[RaggedLayer]:
        """The layers that are evicted."""
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    @property
    def nbytes(self) -> int:
        """Of K and V in all layers, slack and transformers' own layers included."""
        return sum(
            layer.rows.nbytes
            if isinstance(layer, RaggedLayer) and layer.rows is not None
            else sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
            for layer in self.layers
        )

    @property
    def retained_bytes(self) -> int:
        """Of the rows in use in the layers that are evicted; synchronises on CUDA."""
        return sum(
            layer.rows.retained_bytes
            if layer.rows is not None
            else sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
            for layer in self.ragged
        )

    def crop(self, tokens: int) -> None:
        """Drops tokens at the end: `-n` drops n, a positive number is the length to keep.

        Raises:
            ValueError: past the last eviction, whose rows are gone; nothing is dropped then.
        """
        for layer in self.ragged:
            layer.check_crop(tokens)
        super().crop(tokens)

    def reset(self) -> None:
        """Forgets all tokens; settings and model stay."""
        self._session.taken_over()
        super().reset()
