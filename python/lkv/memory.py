"""What the KV cache of a model takes, in full and after eviction, in bytes: before any weights are there.

    footprint(lkv.models.config("smollm2")).nbytes(8192, 0.15)

Nothing is known of configs here. The model of a config is made without memory (of fake tensors), reads two tokens, and
its cache is looked at: which layers hold rows, of how many heads and numbers, and which do not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from lkv.hf.compat import Decoder, attention_modules, find_decoder
from lkv.hf.versions import HFLayer, is_recurrent, with_cache
from lkv.policies.uniform import rows_kept

PROBE = 2  # tokens that a model without memory reads


@dataclass(frozen=True)
class Layer:
    """One layer of a model, as its cache holds it.

    Attributes:
        kind: "full": grows with the text, and is evicted; "sliding": the last `window - 1` rows; "shared": none, it
            reads those of an earlier layer; "recurrent": none, but a state; "none".
        heads, key_dim, value_dim: KV heads, and numbers of a row of K and of V; 0 without rows.
        state_bytes: of one sequence, whatever its length.
    """

    index: int
    kind: str
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    state_bytes: int = 0

    def rows(self, length: int, retention: float = 1.0) -> int:
        """Rows of every head after `length` tokens."""
        if self.kind == "full":
            return rows_kept(length, retention) if retention < 1 else length
        if self.kind == "sliding":
            return min(length, (self.window or 1) - 1)
        return 0

    def slots(self, length: int, retention: float = 1.0, page: int = 1) -> int:
        """Rows of every head that there is memory for, in whole pages.

        The rows lie at the end of the sequence's own pages, as `evict_paged_(to="back")` puts them, so that no more
        than whole pages before them are free.
        """
        rows = self.rows(length, retention)
        return -(-length // page) * page - (length - rows) // page * page if rows else 0


@dataclass(frozen=True)
class Footprint:
    """Layers of a model, and what they take. All bytes are of K and V, and of recurrent states.

    Attributes:
        parameters: of the whole model, tied ones once.
        dtype, weight_dtype: of K and V; of the weights.
        page: rows of a page; 1: rows need no pages.
        limit: tokens that the model is made for, None where its config does not say.
    """

    model_type: str
    layers: tuple[Layer, ...]
    parameters: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    page: int = 1
    limit: int | None = None

    def row_bytes(self, layer: Layer) -> int:
        """Of one row of K and V in all heads of a layer."""
        return layer.heads * (layer.key_dim + layer.value_dim) * self.dtype.itemsize

    def layer_bytes(self, layer: Layer, length: int, retention: float = 1.0) -> int:
        return layer.slots(length, retention, self.page) * self.row_bytes(layer) + layer.state_bytes

    def layer_waste(self, layer: Layer, length: int, retention: float = 1.0) -> int:
        """Bytes of pages that are not filled, or hold rows which had to go by score."""
        unused = layer.slots(length, retention, self.page) - layer.rows(length, retention)
        return unused * self.row_bytes(layer)

    def nbytes(self, length: int, retention: float = 1.0) -> int:
        """Of one sequence of `length` tokens."""
        return sum(self.layer_bytes(layer, length, retention) for layer in self.layers)

    def waste(self, length: int, retention: float = 1.0) -> int:
        return sum(self.layer_waste(layer, length, retention) for layer in self.layers)

    def moved_bytes(self, length: int, retention: float) -> int:
        """What evicting one sequence reads and writes: scores in float32, the rows that are kept, and these again."""
        layers = [x for x in self.layers if x.kind == "full" and x.rows(length, retention) < length]
        scores = sum(4 * layer.heads * length for layer in layers)
        return scores + sum(2 * layer.rows(length, retention) * self.row_bytes(layer) for layer in layers)

    def needed(self, length: int, batch: int, retention: float = 1.0) -> int:
        """Of `batch` sequences while the prompt of the last one is read, which is whole until its end."""
        return (batch - 1) * self.nbytes(length, retention) + self.nbytes(length) if batch else 0

    def longest(self, memory: int, batch: int, retention: float = 1.0) -> int:
        """Most tokens of every one of `batch` sequences in so many bytes, in whole pages."""
        return self.page * _most(lambda pages: self.needed(pages * self.page, batch, retention) <= memory)

    def largest_batch(self, memory: int, length: int, retention: float = 1.0) -> int:
        """Most sequences of `length` tokens in so many bytes."""
        rest = memory - self.nbytes(length)
        return rest // self.nbytes(length, retention) + 1 if rest >= 0 else 0


def footprint(config: PretrainedConfig, dtype: torch.dtype | None = None, page: int = 1) -> Footprint:
    """
    Args:
        config: of a model of transformers. dtype: of K and V; default: that of the config, or else float32. One of a
            byte is that of K and V alone, another one that of recurrent states as well.
        page: rows, a power of two.

    Raises:
        ValueError: for a model that `lkv.Cache` cannot evict, or whose cache is not understood, with the reason.
    """
    if page < 1 or page & (page - 1):
        raise ValueError(f"lkv plan: expected pages of a power of two of rows, got {page}")
    weight_dtype = _dtype(config)
    dtype = dtype or weight_dtype
    state_dtype = dtype if dtype.itemsize > 1 else weight_dtype
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
        # In bfloat16, as kernels of experts know nothing else. The config is changed by it.
        model = _maker(config)(copy.deepcopy(config), dtype=torch.bfloat16).eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        decoder = find_decoder(model)
        layers = _layers(decoder, _read(decoder), state_dtype)
    limit = getattr(decoder.config, "max_position_embeddings", None)
    return Footprint(decoder.config.model_type, layers, parameters, dtype, weight_dtype, page, limit)


def measure_bandwidth(device: torch.device | str = "cpu", nbytes: int = 1 << 27, rounds: int = 9) -> float:
    """Bytes that a copy within the memory of a device reads and writes in a second: the best of some rounds."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        times.append(time.perf_counter() - begin)
    return 2 * nbytes / min(times)


def _maker(config: PretrainedConfig) -> Callable[..., PreTrainedModel]:
    """Of the model that a config names, or else of the causal language model of its type."""
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found._from_config
    return AutoModelForCausalLM.from_config


def _read(decoder: Decoder) -> DynamicCache:
    """The cache of a model that has read some tokens."""
    cache = DynamicCache(config=decoder.config)
    tokens = torch.zeros(1, PROBE, dtype=torch.long, device=decoder.module.device)
    try:
        decoder.module(tokens, **with_cache(decoder.module, cache))
    except Exception as error:  # anything: models without memory stop at what depends on data
        name = type(decoder.module).__name__
        raise ValueError(f"lkv plan: expected a model that runs without its weights, got {name}: {error}") from error
    return cache


def _layers(decoder: Decoder, cache: DynamicCache, dtype: torch.dtype) -> tuple[Layer, ...]:
    found = [_layer(i, layer, decoder, dtype) for i, layer in enumerate(cache.layers)]
    found += [Layer(i, "none") for i in range(len(found), decoder.config.num_hidden_layers)]
    for i, module in attention_modules(decoder.module).items():
        if getattr(module, "is_kv_shared_layer", False):
            found[i] = Layer(i, "shared")
    return tuple(found)


def _layer(index: int, layer: HFLayer, decoder: Decoder, dtype: torch.dtype) -> Layer:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    state = sum(_state_bytes(t, dtype) for t in _states(layer))
    if keys is None or values is None:
        if index in decoder.readers:
            raise _unknown(decoder, index, "does not come to the cache")
        return Layer(index, "recurrent" if state else "none", state_bytes=state)
    if keys.dim() != 4 or keys.shape[2] != PROBE or values.shape[:3] != keys.shape[:3]:
        raise _unknown(decoder, index, f"holds K {list(keys.shape)} and V {list(values.shape)} of {PROBE} tokens")
    shape = dict(heads=keys.shape[1], key_dim=keys.shape[3], value_dim=values.shape[3], state_bytes=state)
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        return Layer(index, "sliding", window=window, **shape)
    if index in decoder.readers:
        return Layer(index, "full", **shape)
    raise _unknown(decoder, index, f"has a cache layer {type(layer).__name__}")


def _states(layer: HFLayer) -> list[Tensor]:
    parts = [getattr(layer, name) for name in ("conv_states", "recurrent_states")] if is_recurrent(layer) else []
    return [t for part in parts for t in (part.values() if isinstance(part, dict) else [part]) if t is not None]


def _state_bytes(state: Tensor, dtype: torch.dtype) -> int:
    """Of the model in its dtype: what is not in that of the probe has one of its own."""
    return state.numel() * (dtype if state.dtype == torch.bfloat16 else state.dtype).itemsize


def _unknown(decoder: Decoder, index: int, reason: str) -> ValueError:
    name = type(decoder.module).__name__
    return ValueError(f"lkv plan: expected a model whose cache is known, got {name}, whose layer {index} {reason}")


def _dtype(config: PretrainedConfig) -> torch.dtype:
    """Of the weights; of parts with configs of their own, that of the text may be the one that says it."""
    parts = [
        getattr(part, name, None) for part in (config, config.get_text_config()) for name in ("dtype", "torch_dtype")
    ]
    found = next(filter(None, parts), None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def _most(fits: Callable[[int], bool]) -> int:
    """The largest whole number that fits, where all below it do."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
