"""The reference: the whole sequence at once through plain attention, what the cache did not show masked.

While a cache is in use, a `Recorder` writes down which positions every query of every head had before it. Afterwards
one forward of the same tokens without any cache, with exactly these masks, must give the same logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from families import HEADS, places
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lkv
import lkv_ext
from lkv.hf.compat import find_decoder


class Recorder:
    """`visible[layer]`: bool `[B, H, L, L]`, the keys that each query attended to."""

    def __init__(self, cache: lkv.Cache, batch: int, length: int) -> None:
        self.cache = cache
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.visible = {layer.index: causal.repeat(batch, HEADS, 1, 1) for layer in cache.ragged}

    def note(self, rows: lkv_ext.RaggedCache, count: int) -> None:
        (layer,) = (layer for layer in self.cache.ragged if layer.rows is rows)
        positions = rows.padded(rows.positions).long()
        used = torch.arange(positions.shape[2]) < rows.lengths[..., None]
        visible = self.visible[layer.index]
        counts = torch.zeros(*visible.shape[:2], visible.shape[3] + 1, dtype=torch.bool)
        counts.scatter_(2, torch.where(used, positions, visible.shape[3]), True)
        for place in range(rows.seen - count, rows.seen):
            visible[:, :, place, : place + 1] = counts[:, :, : place + 1]


@contextmanager
def recorded(cache: lkv.Cache, batch: int, length: int) -> Iterator[Recorder]:
    recorder, attend = Recorder(cache, batch, length), lkv_ext.RaggedCache.attend

    def noted(rows: lkv_ext.RaggedCache, query: Tensor, **options: object) -> Tensor:
        recorder.note(rows, query.shape[2])
        return attend(rows, query, **options)

    lkv_ext.RaggedCache.attend = noted
    try:
        yield recorder
    finally:
        lkv_ext.RaggedCache.attend = attend


def own_attention(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention of a model, with all that it does to its logits."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def masked_logits(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    visible: dict[int, Tensor],
    weights: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits `[B, L, V]` of all tokens; `mask` `[B, L]` is 1 for those that are no padding.

    `weights` is given those of eager attention, by layer: `[B, Hq, L, L]`.
    """
    config = model.get_decoder().config
    owner = {reader: layer for layer, readers in find_decoder(model).readers.items() for reader in readers}
    own = config._attn_implementation
    seen = {layer: shown & mask.bool()[:, None, None] for layer, shown in visible.items()}
    diagonal = torch.eye(ids.shape[1], dtype=torch.bool)  # padding sees itself, lest it be NaN

    def attention(module, query, key, value, attention_mask, **kwargs):
        if owner.get(module.layer_idx) in seen:
            shown = (seen[owner[module.layer_idx]] | diagonal).repeat_interleave(query.shape[1] // key.shape[1], 1)
            attention_mask = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
        out, paid = own_attention(own, module)(module, query, key, value, attention_mask, **kwargs)
        if weights is not None:
            weights[module.layer_idx] = paid
        return out, paid

    AttentionInterface.register("masked_reference", attention)
    AttentionMaskInterface.register("masked_reference", ALL_MASK_ATTENTION_FUNCTIONS[own])
    config._attn_implementation = "masked_reference"
    try:
        return model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits
    finally:
        config._attn_implementation = own
