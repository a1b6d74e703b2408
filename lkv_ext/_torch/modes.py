"""The modes that an op may be called in: tracing, no_grad and inference_mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def keeps_tensors(method: Callable[P, T]) -> Callable[P, T]:
    """Runs a method without gradients and outside of inference mode, whose tensors cannot be written to later."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


def plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that may be written to anywhere if it was made in inference mode."""
    if torch.compiler.is_compiling():  # is_inference is not known there; a later write outside of inference mode raises
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def traced(tensor: Tensor) -> bool:
    """Whether the values of a tensor must not be read: it has none, or they would become constants of a graph."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() and import_module("torch.fx.experimental.proxy_tensor").get_proxy_mode():
        return True
    return type(tensor) is not Tensor and import_module("torch._subclasses.fake_tensor").is_fake(tensor)
