"""Who runs beside evict and select on a CUDA device: those that are there, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import rivals
import torch
from shapes import Inputs, Shape
from timing import Call
from torch import Tensor

Maker = Callable[[Inputs], Call]
# Whose work may wait for the device, which a CUDA graph cannot have.
MAY_NOT_CAPTURE = ("flashinfer", "torch.compile")


@dataclass
class Field:
    """The calls by name; for who is missing, the reason."""

    calls: dict[str, Call] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def same_bytes(moved: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = [[t.reshape(-1).view(torch.uint8) for t in pair] for pair in zip(moved, expected, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def settled(shape: Shape) -> bool:
    """Whether the scores alone decide which rows are kept: 16 bits tie, and a rival may keep any of a tie."""
    return shape.score_dtype == torch.float32


def for_evict(inputs: Inputs, expected: Sequence[Tensor]) -> Field:
    """All that can do the work of `evict(inputs)`.

    Args:
        expected: K and V as evict moves them; a rival that moves other rows is left out.
    """
    ragged = not isinstance(inputs.shape.budgets, int)
    makers = {
        **({"best batched": rivals.best_batched} if ragged else {"best by mask": rivals.best_by_mask}),
        "torch.compile": rivals.compiled_ragged if ragged else rivals.compiled,
        "flashinfer": rivals.flashinfer_ragged if ragged else rivals.flashinfer,
        "triton": _lazy("rivals_triton", "evict"),
        f"{_cub(inputs)}, sort, our gather": _lazy("rivals_cuda", "evict"),
        "one block per head": _lazy("rivals_cuda", "one_block_per_head"),
    }
    return race_of(makers, inputs, lambda moved: same_bytes(moved, expected))


def for_select(inputs: Inputs, expected: Tensor) -> Field:
    """All that can do the work of `select(scores)`, with `expected` positions `row * L + position`, int32 `[T']`."""
    makers = {"triton": _lazy("rivals_triton", "select"), f"{_cub(inputs)}, sort": _lazy("rivals_cuda", "select")}
    if isinstance(inputs.shape.budgets, int):
        makers["flashinfer"] = rivals.flashinfer_positions
    return race_of(makers, inputs, lambda positions: torch.equal(positions.to(expected.dtype), expected))


def for_evict_in_place(inputs: Inputs) -> Field:
    """All that can do the work of `evict_(inputs)`, on these inputs, which change."""
    return race_of({"one block per head": _lazy("rivals_cuda", "one_block_in_place")}, inputs, lambda _: True)


def for_layers(layers: Sequence[Inputs], expected: Sequence[Tensor]) -> Field:
    """`for_evict` of each layer, one after the other; all of them give `expected`."""
    fields = [for_evict(layer, expected) for layer in layers]
    skipped = {name: why for each in fields for name, why in each.skipped.items()}
    calls = {name: _in_turn([each.calls[name] for each in fields]) for name in fields[0].calls if name not in skipped}
    return Field(calls, skipped)


def reason(error: BaseException) -> str:
    """One line of what went wrong."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def versions() -> dict[str, str]:
    """The versions of the packages behind the rivals, if installed."""
    found = {}
    for package in ("triton", "flashinfer-python", "nvidia-cuda-cccl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    with suppress(ImportError, OSError, RuntimeError):
        found["cub"] = import_module("rivals_cuda").cub_version()
    return found


def race_of(makers: dict[str, Maker], inputs: Inputs, right: Callable[[object], bool]) -> Field:
    """Makes and tries each; `right` judges what a call gives."""
    found = Field()
    for name, make in makers.items():
        # They compile, load and launch what others wrote: whatever they raise must not end the benchmark.
        try:
            call = make(inputs)
            result = call()
            if settled(inputs.shape) and not right(result):
                raise ValueError("keeps other rows than evict")
            if inputs.k.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            found.skipped[name] = reason(error)
        else:
            found.calls[name] = call
    return found


def _lazy(module: str, name: str) -> Maker:
    """A rival whose module may fail to import."""
    return lambda inputs: getattr(import_module(module), name)(inputs)


def _cub(inputs: Inputs) -> str:
    """Which of CUB's two it is."""
    try:
        return f"cub {import_module('rivals_cuda').form(inputs.shape.length)}"
    except (ImportError, OSError, RuntimeError):
        return "cub"


def _in_turn(calls: Sequence[Call]) -> Call:
    return lambda: [call() for call in calls]
