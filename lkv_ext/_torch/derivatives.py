"""What the derivatives of all ops share: whether one is wanted, and a clear refusal where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lkv_ext._torch.vmap import EachSample


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, of torch.autograd or of torch.func."""
    return forward_ad._current_level >= 0


def wanted(tensors: Iterable[Tensor]) -> bool:
    """Whether a derivative may be needed. Tangents are not looked at: those of outer levels do not show."""
    return (torch.is_grad_enabled() and any([t.requires_grad for t in tensors])) or in_forward_mode()


def refuse(tensors: Iterable[Tensor], why: str) -> None:
    """Raises ValueError where one of `tensors` requires a gradient or carries a tangent; `why` ends its message."""
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        raise ValueError(f"expected tensors that require no gradient, got some: {why}")
    refuse_tangents(tensors, why)


def refuse_tangents(tensors: Iterable[Tensor], why: str) -> None:
    """Raises ValueError where one of `tensors` carries a tangent."""
    if in_forward_mode():
        _NoTangents.apply(why, *tensors)


class _NoTangents(EachSample):
    """torch calls `jvp` where an input has a tangent, also one of an outer level."""

    @staticmethod
    def forward(why: str, *tensors: Tensor) -> Tensor:
        return torch.empty(0, device="cpu")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise ValueError(f"expected tensors without tangents, got some: {ctx.why}")


@contextmanager
def outer_levels(tensors: Iterable[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """What `jvp` computes with. torch calls it with forward mode off, which would lose the tangents of outer levels."""
    with forward_ad._set_fwd_grad_enabled(True):
        yield [t if t is None else forward_ad.unpack_dual(t).primal for t in tensors]
