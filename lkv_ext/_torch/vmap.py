"""torch.vmap: every op runs once for each sample, as samples need not agree in an index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lkv_ext._torch.library import ops


def each(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of `op` for torch.vmap."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        leaves, spec = tree_flatten(args)
        dims = tree_flatten(in_dims, is_leaf=lambda x: x is None)[0]

        def sample(i: int) -> object:
            parts = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True)]
            return op(*tree_unflatten(parts, spec))

        results = [tree_flatten(sample(i)) for i in range(info.batch_size)]
        stacked = [torch.stack(parts) for parts in zip(*(parts for parts, _ in results), strict=True)]
        result = tree_unflatten(stacked, results[0][1])
        return result, tree_map(lambda _: 0, result)

    return rule


class EachSample(Function):
    """A function with this rule. It stays right when it is itself differentiated, which a generated rule does not."""

    def __init_subclass__(cls) -> None:
        cls.vmap = staticmethod(each(cls.apply))  # type: ignore[method-assign]  # how torch is given a rule


def call(function: type[EachSample], *args: Any) -> Any:
    """`function.apply(*args)`; eager, without reading the signature of `forward` at every call, as that does."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]  # of its C base


def register(name: str) -> None:
    """Gives an op this rule.

    Ops that write in place get none: torch refuses these by name, as it must where samples share what is written.
    """
    torch.library.register_vmap(f"lkv_ext::{name}", each(getattr(ops, name).default))
