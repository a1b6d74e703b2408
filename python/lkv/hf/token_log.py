"""What is kept of every token beside its rows, where policies need it: `[B, L, ...]`, evicted tokens included."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lkv_ext.shared import keeps_tensors


class TokenLog:
    """Grows by the tokens of every call; put together when it is read, not at every step.

    Tensors are never written to, so that copies of a log share them. A batch of 1 may stand for any batch.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self.length = 0

    @keeps_tensors
    def push(self, part: Tensor, order: Tensor | None = None) -> None:
        """`[B, n, X]`, of the next n tokens; in the order `[B, n]` if it is given."""
        self._parts.append(_ordered(part.detach(), order))
        self.length += part.shape[1]

    @keeps_tensors
    def read(self) -> Tensor:
        if len(self._parts) > 1:
            batch = max(part.shape[0] for part in self._parts)
            self._parts = [torch.cat([part.expand(batch, *part.shape[1:]) for part in self._parts], 1)]
        return self._parts[0]

    def truncate(self, length: int) -> None:
        """Forgets all tokens from place `length` on."""
        if length < self.length:
            self._parts = [self.read()[:, :length]] if length else []
            self.length = length

    @keeps_tensors
    def blank(self, leaving: Tensor) -> None:
        """NaN for some tokens: bool `[B, L]`."""
        whole = self.read()
        self._parts = [whole.masked_fill(leaving[..., None].to(whole.device), torch.nan)]

    @keeps_tensors
    def select(self, indices: Tensor) -> None:
        """Sequences `indices`, in that order."""
        self._parts = [p if p.shape[0] == 1 else p[indices.to(p.device).clone()] for p in self._parts]

    def __deepcopy__(self, memo: dict[int, object]) -> TokenLog:
        other = type(self)()
        other._parts, other.length = list(self._parts), self.length
        return other


class Rotary:
    """The rotations of all tokens, one for all layers that were given the same."""

    def __init__(self) -> None:
        self.cos, self.sin = TokenLog(), TokenLog()
        self.last: weakref.ref[Tensor] | None = None

    def push(self, before: int, cos: Tensor, sin: Tensor, order: Tensor | None) -> None:
        """`[B, n, R]` of the tokens behind the first `before`; each layer comes with the same.

        Raises:
            ValueError: where a layer comes with others.
        """
        if self.cos.length == before:
            self.cos.push(cos, order)
            self.sin.push(sin, order)
            self.last = weakref.ref(cos)
        elif self.last is None or self.last() is not cos:
            known = [log.read()[:, before:] for log in (self.cos, self.sin)]  # a copy for each layer, perhaps
            given = [_ordered(t, order).expand_as(k) for t, k in zip((cos, sin), known, strict=True)]
            if not all(map(torch.equal, known, given)):
                raise ValueError(
                    "lkv.Cache: expected one rotary embedding in layers that had the same before, got different ones"
                )

    def truncate(self, length: int) -> None:
        self.cos.truncate(length)
        self.sin.truncate(length)

    def select(self, indices: Tensor) -> None:
        self.cos.select(indices)
        self.sin.select(indices)

    def undo(self, keys: Tensor, positions: Tensor | None = None) -> Tensor:
        """Keys as they were before they were rotated.

        A pair of numbers (x, y) came out as (x cos - y sin, y cos + x sin), with cos and sin scaled by some models
        (YaRN, LongRoPE); what undoes it exactly, scale and rounding of cos and sin included, is its transpose over
        cos^2 + sin^2. Numbers behind the first R were not rotated.

        Args:
            keys: `[B, H, L, D]`.
            positions: int `[B, H, L]`, clamped; None: rows are whole, and L is all.
        """
        cos, sin = self.cos.read(), self.sin.read()
        rotated = cos.shape[-1]
        out = keys.clone()
        for head in range(keys.shape[1]):  # one at a time: in float32 all would be twice the layer's keys
            c, s = cos.float(), sin.float()
            if positions is not None:
                at = positions[:, head].long().clamp(0, cos.shape[1] - 1)[..., None].expand(-1, -1, rotated)
                c, s = (t.expand(len(at), -1, -1).gather(1, at).float() for t in (cos, sin))
            turned = keys[:, head, :, :rotated].float()
            first, second = turned.chunk(2, -1)
            back = turned * c - torch.cat([-second, first], -1) * s
            out[:, head, :, :rotated] = back / (c * c + s * s)
        return out


class RotaryView:
    """The rotations of a layer for policies; see `lkv.policies.protocol.Rotation`."""

    def __init__(self, rotary: Rotary, embedding: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], counts: list[int]):
        self.rotary, self.embedding, self.counts = rotary, embedding, counts

    def undo(self, rows: Tensor, positions: Tensor) -> Tensor:
        return self.rotary.undo(rows, positions[:, None].expand(rows.shape[:3]))

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        cos = self.rotary.cos.read()
        places = torch.tensor(self.counts, device="cpu")[:, None] + torch.arange(count, device="cpu")
        like = torch.empty(0, dtype=torch.float32, device=cos.device)
        found, more = self.embedding(like, places.to(cos.device))
        return found.float(), more.float()


class Rotations:
    """The different rotations of a cache: one where all layers are given the same, one for each device, and so on."""

    def __init__(self) -> None:
        self.all: list[Rotary] = []

    def of(self, cos: Tensor) -> Rotary:
        """The one of the layers that have come with these very rotations, or a new one."""
        for rotary in self.all:
            if rotary.last is not None and rotary.last() is cos:
                return rotary
        self.all.append(Rotary())
        return self.all[-1]

    def load(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Cos and sin of each, `[B or 1, L, R]`."""
        self.clear()
        for cos, sin in parts:
            self.all.append(Rotary())
            self.all[-1].push(0, cos, sin, None)

    def select(self, indices: Tensor) -> None:
        for rotary in self.all:
            rotary.select(indices)

    def drop_empty(self) -> None:
        """Forgets those of a call that was taken back."""
        self.all[:] = [rotary for rotary in self.all if rotary.cos.length]

    def clear(self) -> None:
        self.all.clear()


def _ordered(part: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return part
    part = part.expand(len(order), -1, -1)
    return part.gather(1, order.to(part.device)[..., None].expand_as(part))
