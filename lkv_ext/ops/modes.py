"""Tensors that outlive the call: `generate` runs under no_grad, others under inference_mode, and both in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P, T = ParamSpec("P"), TypeVar("T")


def keeps_tensors(method: Callable[P, T]) -> Callable[P, T]:
    """Without gradients, and outside of inference mode: a tensor made within can never be written to without."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


def plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that may be written to anywhere if it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
