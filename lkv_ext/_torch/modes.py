"""What an op asks of the mode that it is called in: tracing, no_grad or inference_mode, of which some come in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
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
    if torch.compiler.is_compiling():  # which cannot tell: a write outside of inference mode would be refused then
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def traced(tensor: Tensor) -> bool:
    """Whether the values of a tensor are not to be read: none are there, or they would become constants of a graph."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() and import_module("torch.fx.experimental.proxy_tensor").get_proxy_mode():
        return True
    return type(tensor) is not Tensor and import_module("torch._subclasses.fake_tensor").is_fake(tensor)
