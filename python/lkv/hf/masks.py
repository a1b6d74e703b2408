"""Reads the masks of a call: which tokens they hide from all others, and whether they are causal apart from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Mask = Tensor | Mapping[str, Tensor | None] | None  # what a decoder may be given, see `read`


@dataclass(frozen=True)
class PaddingInfo:
    """The padding among the new tokens of a call.

    Attributes:
        counts: per sequence, new tokens that are no padding.
        order: int64 `[B, n]`, the tokens with padding first and otherwise in their order; None: they came so.
    """

    counts: list[int]
    order: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor) -> PaddingInfo | None:
        """From bool `[B, n]`, the hidden tokens; None: nothing is hidden."""
        count = hidden.shape[1]
        visible = (~hidden).sum(1)
        in_order = (hidden == (torch.arange(count, device=hidden.device) < count - visible[:, None])).all()
        *counts, ordered = torch.cat([visible, in_order[None]]).tolist()  # one synchronisation on CUDA
        if all(n == count for n in counts):
            return None
        return cls(counts, None if ordered else (~hidden).byte().argsort(dim=1, stable=True))


@dataclass(frozen=True)
class Visible:
    """A mask, read.

    Attributes:
        hidden: bool `[B, L]`, the tokens that no other may see; None: there are none.
        causal: every query sees what is not hidden, up to itself, and nothing else.
    """

    hidden: Tensor | None
    causal: bool


def read(mask: Mask, outer: Tensor | None, known: Tensor | None, batch: int, seen: int, count: int) -> Visible:
    """Reads the mask that a decoder is given for `count` tokens after the first `seen`.

    Args:
        mask: `[B, L]`; `[B or 1, H or 1, n, L]`, bool or additive; one of these by the kind of the layer; or None.
        outer: `[B, L]`, as given to the model around the decoder, which may have made `mask` of it.
        known: bool `[B, seen]`, what was hidden before.

    Raises:
        TypeError, ValueError: for an object that is no mask, and a mask of another size.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    total = seen + count
    outer = outer if outer is not None and tuple(outer.shape) == (batch, total) else None
    if outer is not None and (mask is None or mask.shape != outer.shape):
        square = None if mask is None or mask.shape[-1] != total or mask.dim() == 2 else mask
        causal = square is None or _read_square(square, batch, seen, count).causal
        return Visible(_read_rows(outer, batch, total), causal)
    if mask is None:
        return Visible(None, True)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        form = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"lkv.Cache: expected attention_mask of shape [B, L] or [B, H, n, L], got {form}")
    if mask.dim() == 2:
        return Visible(_read_rows(mask, batch, total), True)
    if (
        mask.shape[-1] == count != total
    ):  # of the new tokens among themselves, as a model makes it where rows are packed
        new = _read_square(mask, batch, 0, count)
        if new.hidden is None and known is None:
            return new
        before = known if known is not None else torch.zeros(batch, seen, dtype=torch.bool, device=mask.device)
        after = new.hidden if new.hidden is not None else before.new_zeros(batch, count)
        return Visible(torch.cat([before, after], 1), new.causal)
    return _read_square(mask, batch, seen, count)


def is_causal(mask: Tensor, batch: int, count: int) -> bool:
    """Whether a mask of new tokens among themselves, `[B or 1, H or 1, n, n]`, is causal but for hidden tokens.

    Fewer queries are the last ones: some models compute the last logits alone.
    """
    queries = min(mask.shape[-2], count)
    return mask.dim() == 2 or _read_square(mask, batch, mask.shape[-1] - queries, queries).causal


def _read_rows(mask: Tensor, batch: int, total: int) -> Tensor | None:
    if tuple(mask.shape) != (batch, total):
        raise ValueError(
            f"lkv.Cache: expected attention_mask of all tokens, cached and new, [B, L] = {[batch, total]}, "
            f"got {list(mask.shape)}"
        )
    hidden = mask == 0
    return hidden if bool(hidden.any()) else None


def _read_square(mask: Tensor, batch: int, seen: int, count: int) -> Visible:
    total = seen + count
    if mask.shape[0] not in (1, batch) or tuple(mask.shape[2:]) != (count, total):
        raise ValueError(
            "lkv.Cache: expected attention_mask of shape [B, H, n, L] = "
            f"[{batch}, H, {count}, {total}], got {list(mask.shape)}"
        )
    additive = mask.is_floating_point()
    visible = mask == 0 if additive else mask != 0
    biased = bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()) if additive else False
    shown = visible.any(2).any(1).expand(batch, -1)  # by some query: what none sees is hidden
    place = torch.arange(total, device=mask.device)
    expected = (place <= place[seen:, None]) & shown[:, None, None]
    same = (visible == expected) | ~shown[:, None, seen:, None]
    hidden = ~shown
    return Visible(hidden if bool(hidden.any()) else None, not biased and bool(same.all()))
