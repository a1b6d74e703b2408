"""Who runs beside evict and select on a CUDA device besides PyTorch's operators: those that are there, and why others
are not. What is made from others' code is tried once and its rows are compared before it may race."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import rivals_torch as pytorch
import torch
from shapes import Shape
from timing import Call
from torch import Tensor

Maker = Callable[[Any], Call]  # from the inputs of one layer or of several
# Whose work may wait for the device, which a CUDA graph cannot have.
MAY_NOT_CAPTURE = ("flashinfer", "torch.compile")


def _lazy(module: str, name: str, **options: bool) -> Maker:
    """A rival whose module may fail to import."""
    return lambda inputs: getattr(import_module(module), name)(inputs, **options)


IN_PLACE = {"one block per head": _lazy("rivals_cuda", "one_block_per_head", in_place=True)}


def of_evict(shape: Shape) -> dict[str, Maker]:
    """All that can do the work of `evict`."""
    return {
        **({"best batched": pytorch.best_batched} if shape.skewed else {"best by mask": pytorch.best_by_mask}),
        "torch.compile": pytorch.compiled_ragged if shape.skewed else pytorch.compiled,
        "flashinfer": pytorch.flashinfer_ragged if shape.skewed else pytorch.flashinfer,
        "triton": _lazy("rivals_triton", "evict"),
        f"{_cub(shape)}, sort, our gather": _lazy("rivals_cuda", "evict"),
        "one block per head": _lazy("rivals_cuda", "one_block_per_head"),
    }


def of_select(shape: Shape) -> dict[str, Maker]:
    """All that can do the work of `select`; they give positions `row * L + position`, `[T']`."""
    makers = {"triton": _lazy("rivals_triton", "select"), f"{_cub(shape)}, sort": _lazy("rivals_cuda", "select")}
    return makers if shape.skewed else {**makers, "flashinfer": pytorch.flashinfer_positions}


def in_turn(make: Maker) -> Maker:
    """Of several layers, one after the other."""

    def make_all(layers: Sequence[pytorch.Inputs]) -> Call:
        calls = [make(layer) for layer in layers]
        return lambda: [rows for call in calls for rows in call()]

    return make_all


def _cub(shape: Shape) -> str:
    """Which of CUB's two it is."""
    try:
        return f"cub {import_module('rivals_cuda').form(shape.length)}"
    except (ImportError, OSError, RuntimeError):
        return "cub"


def same_bytes(moved: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = [[t.reshape(-1).view(torch.uint8) for t in pair] for pair in zip(moved, expected, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def keeps(shape: Shape, expected: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
    """Whether these rows were moved; all are right where scores tie, as 16 bits do: a rival may keep any of a tie."""
    return lambda moved: shape.score_dtype != torch.float32 or same_bytes(moved, expected)


def admit(
    makers: dict[str, Maker], inputs: Any, right: Callable[[Any], bool]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Makes and tries each; `right` judges what a call gives.

    Returns:
        The calls by name; for who is missing, the reason.
    """
    calls, missing = {}, {}
    for name, make in makers.items():
        # They compile, load and launch what others wrote: whatever they raise must not end the benchmark.
        try:
            call = make(inputs)
            if not right(call()):
                raise ValueError("keeps other rows than evict")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            missing[name] = reason(error)
        else:
            calls[name] = call
    return calls, missing


def reason(error: BaseException) -> str:
    """One line of what went wrong."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def versions() -> dict[str, str]:
    """The versions of the packages behind the rivals, if installed."""
    found = {}
    for package in ("triton", "flashinfer-python", "nvidia-cuda-cccl"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    with suppress(ImportError, OSError, RuntimeError):
        found["cub"] = import_module("rivals_cuda").cub_version()
    return found
