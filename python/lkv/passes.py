"""Forward passes of a frozen model over tokens behind a context that was read before, with an attention of ours.

For distillation: the teacher sees the context's keys and values as they are. The student sees them through a log-mask,
which is added to the attention logits of every query behind the context, the same for all query heads of a KV head.
Gradients reach nothing but that mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from lkv.hf import Cache
from lkv.hf.attention import Logits, logits_of
from lkv.hf.versions import with_cache

NAME = "lkv_passes"
# (layer, query [B, Hq, m, D], keys [B, H, n + m, D], values [B, H, n + m, Dv], logits) -> [B, Hq, m, Dv]
Attend = Callable[[int, Tensor, Tensor, Tensor, Logits], Tensor]


@dataclass(frozen=True)
class Context:
    """Keys and values of all layers, `[B, H, n, D]` each; of sequence b the first `lengths[b]` are there."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor

    @classmethod
    def of(cls, cache: Cache) -> Context:
        """What a cache has read, before its first eviction; padding in front of a text goes behind it.

        Raises:
            ValueError: for a cache that is empty, or of which rows are gone.
        """
        rows = [(x.keys, x.values) for x in cache.ragged if x.keys is not None and x.values is not None]
        if len(rows) < len(cache.ragged):
            raise ValueError(
                "lkv: expected a cache that holds all rows of a text, with padding in front of it alone, got one that "
                "is empty, evicted, or had padding elsewhere"
            )
        size, device = rows[0][0].shape[2], rows[0][0].device
        lengths = torch.tensor(cache.ragged[0].token_counts, device=device)
        if bool((lengths < size).any()):
            behind = (torch.arange(size, device=device) + size - lengths[:, None]) % size
            index = behind[:, None, :, None]
            rows = [(k.take_along_dim(index, 2), v.take_along_dim(index, 2)) for k, v in rows]
        return cls(tuple(k for k, _ in rows), tuple(v for _, v in rows), lengths)

    @property
    def batch(self) -> int:
        return self.lengths.numel()

    @property
    def size(self) -> int:
        """n, padding included."""
        return self.keys[0].shape[2]

    def repeat(self, times: int) -> Context:
        """Every sequence `times` times in a row."""
        if times == 1:
            return self
        keys, values = ([t.repeat_interleave(times, 0) for t in part] for part in (self.keys, self.values))
        return Context(tuple(keys), tuple(values), self.lengths.repeat_interleave(times))

    def pick(self, rows: Sequence[int]) -> Context:
        """These sequences."""
        index = list(rows)
        if index == list(range(self.batch)):
            return self
        return Context(tuple(k[index] for k in self.keys), tuple(v[index] for v in self.values), self.lengths[index])


def follow(
    model: PreTrainedModel,
    context: Context,
    tokens: Tensor,
    *,
    log_masks: Tensor | Sequence[Tensor] | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """Hidden states `[B, m, hidden]` of the tokens `[B, m]` that come after a context.

    Args:
        tokens: padded on the right with anything.
        log_masks: per layer `[B, H, n]`, added to the logits of the context's keys.
        attend: the attention of every layer; default: `Masked`.

    Raises:
        ValueError: for a model that does not attend to all that came before in every layer.
    """
    layers = model.get_decoder().config.num_hidden_layers
    if len(context.keys) != layers:
        raise ValueError(
            f"lkv: expected a model of full attention in all {layers} layers, got keys and values of "
            f"{len(context.keys)}: neither training nor a second pass goes over layers of another kind"
        )
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(context.keys, context.values, strict=True)):
        cache.update(keys, values, layer)
    count = tokens.shape[1]
    places = context.lengths[:, None] + torch.arange(count, device=tokens.device)
    decoder = model.get_decoder()
    with using(model) as own:
        output = decoder(
            tokens,
            position_ids=places,
            **with_cache(decoder, cache),
            lkv_attend=Masked(context, log_masks) if attend is None else attend,
            lkv_own=own,
        )
    return output.last_hidden_state


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lkv_attend: Attend | None = None,
    lkv_own: str = "eager",
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`[B, Hq, m, D]` against the context and the m tokens themselves: `[B, m, Hq, Dv]`.

    Scale, soft cap and sinks `[Hq]` are those of the model's own attention `lkv_own`.

    Raises:
        ValueError: for a sliding window, and where a decoder does not hand on what `follow` calls it with.
    """
    if lkv_attend is None:
        raise ValueError(
            "lkv: expected a model whose decoder hands keyword arguments on to its attention, got "
            f"{type(module).__name__} without them"
        )
    layer = cast(int, module.layer_idx)
    if sliding_window is not None:
        raise ValueError(f"lkv: expected full attention in layer {layer}, got a window of {sliding_window}")
    return lkv_attend(layer, query, key, value, logits_of(lkv_own, query, kwargs)).transpose(1, 2), None


@dataclass(frozen=True)
class Masked:
    """Attention through a log-mask, which gradients reach.

    Attributes:
        log_masks: per layer `[B, H, n]`; None: all rows of the context count in full.
    """

    context: Context
    log_masks: Tensor | Sequence[Tensor] | None = None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> Tensor:
        scaling, softcap, sinks = logits
        (batch, heads, count, _), groups, size = query.shape, key.shape[1], self.context.size
        paid = ((query * scaling).reshape(batch, groups, -1, query.shape[-1]) @ key.transpose(2, 3)).float()
        if softcap is not None:
            paid = softcap * torch.tanh(paid / softcap)
        bias = paid.new_zeros(batch, groups, 1, size + count)
        bias[..., :size] = visible(self.context, query.device)[:, None, None]
        if self.log_masks is not None:
            bias = torch.cat([bias[..., :size] + self.log_masks[layer][:, :, None], bias[..., size:]], -1)
        paid = paid.view(batch, groups, heads // groups, count, -1) + bias[:, :, None]
        future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        paid = torch.cat([paid[..., :size], paid[..., size:].masked_fill(future, -torch.inf)], -1)
        if sinks is not None:  # a column more, which nothing is read from
            column = sinks.float().view(1, groups, -1, 1, 1).expand(*paid.shape[:-1], 1)
            paid = torch.cat([paid, column], -1)
        weights = paid.softmax(-1)[..., : size + count].to(value.dtype)
        out = weights.reshape(batch, groups, -1, size + count) @ value
        return out.view(batch, heads, count, -1)


def visible(context: Context, device: torch.device) -> Tensor:
    """float32 `[B, n]`: 0 where the context has a token, -inf in its padding."""
    there = torch.arange(context.size, device=device) < context.lengths[:, None].to(device)
    return torch.zeros(there.shape, device=device).masked_fill(~there, -torch.inf)


@contextmanager
def using(model: PreTrainedModel) -> Iterator[str]:
    """The model with the attention of this file, and with its own again afterwards; the name of its own."""
    config = model.get_decoder().config
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield own
    finally:
        config._attn_implementation = own


AttentionInterface.register(NAME, attention)
