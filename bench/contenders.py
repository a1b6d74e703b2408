"""Who runs beside evict and select on a CUDA device: those that are there, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    return all(
        torch.equal(m.reshape(-1).view(torch.uint8), e.reshape(-1).view(torch.uint8))
        for m, e in zip(moved, expected, strict=True)
    )


def settled(shape: Shape) -> bool:
    """Whether the scores alone say which rows are kept: 16 bits tie, and who does not promise may keep any of a tie."""
    return shape.score_dtype == torch.float32


def for_evict(inputs: Inputs, expected: Sequence[Tensor]) -> Field:
    """Whoever can do the work of `evict(inputs)`.

    Args:
        expected: K and V as evict moves them; who moves other rows is left out.
    """
    if isinstance(inputs.shape.budgets, int):
        makers = {
            "best by mask": rivals.best_by_mask,
            "torch.compile": rivals.compiled,
            "flashinfer": rivals.flashinfer,
        }
    else:
        makers = {
            "best batched": rivals.best_batched,
            "torch.compile": rivals.compiled_ragged,
            "flashinfer": rivals.flashinfer_ragged,
        }
    makers |= {"triton": _triton("evict"), f"{_cub(inputs)}, sort, our gather": _cuda("evict")}
    makers |= {"one block per head": _cuda("one_block_per_head")}
    return race_of(makers, inputs, lambda moved: same_bytes(moved, expected))


def for_select(inputs: Inputs, expected: Tensor) -> Field:
    """Whoever can do the work of `select(scores)`, with `expected` positions `row * L + position`, int32 `[T']`."""
    makers = {"triton": _triton("select"), f"{_cub(inputs)}, sort": _cuda("select")}
    if isinstance(inputs.shape.budgets, int):
        makers["flashinfer"] = rivals.flashinfer_positions
    return race_of(makers, inputs, lambda positions: torch.equal(positions.to(expected.dtype), expected))


def for_evict_in_place(inputs: Inputs) -> Field:
    """Whoever can do the work of `evict_(inputs)`, on these inputs, which change."""
    return race_of({"one block per head": _cuda("one_block_in_place")}, inputs, lambda _: True)


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
    """Of what the rivals are made of, where it is installed."""
    found = {}
    for package in ("triton", "flashinfer-python", "nvidia-cuda-cccl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        from rivals_cuda import cub_version

        found["cub"] = cub_version()
    except (ImportError, OSError, RuntimeError):
        pass
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


def _triton(name: str) -> Maker:
    def make(inputs: Inputs) -> Call:
        import rivals_triton

        return getattr(rivals_triton, name)(inputs)

    return make


def _cuda(name: str) -> Maker:
    def make(inputs: Inputs) -> Call:
        import rivals_cuda

        return getattr(rivals_cuda, name)(inputs)

    return make


def _cub(inputs: Inputs) -> str:
    """Which of CUB's two it is."""
    try:
        from rivals_cuda import form

        return f"cub {form(inputs.shape.length)}"
    except (ImportError, OSError, RuntimeError):
        return "cub"


def _in_turn(calls: Sequence[Call]) -> Call:
    return lambda: [call() for call in calls]
