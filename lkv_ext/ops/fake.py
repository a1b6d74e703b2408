"""Fake kernels of the ops: shapes and dtypes without data."""

from __future__ import annotations

import torch
from torch import Tensor

from lkv_ext._arguments import MOST


def _row_sets(tensors: list[Tensor], layers: int, cu_seqlens: Tensor | None, batch: int, heads: int) -> list[int]:
    if cu_seqlens is None:
        batch, heads = tensors[0].shape[:2]
    return [batch, heads] if layers == 1 else [layers, batch, heads]


def _index(like: Tensor, shape: list[int], total: int, padded: int, count_overflow: bool) -> list[Tensor]:
    rows = 1
    for size in shape:
        rows = rows * size
    known = isinstance(total, int) and isinstance(padded, int) and isinstance(rows, int)
    if known and not (0 <= total <= MOST and padded <= MOST and (padded < 0 or total == rows * padded)):
        raise RuntimeError(
            f"ValueError: expected an output of at most 2**31 - 1 rows, {rows} spans of {padded}, got {total}"
        )
    sizes = [[total] if padded < 0 else [*shape, padded], shape, [rows + 1], *([[]] if count_overflow else [])]
    return [like.new_empty(size, dtype=torch.int32) for size in sizes]


def _moved(payload: list[Tensor], layers: int, cu_seqlens: Tensor | None, leading: list[int]) -> list[Tensor]:
    token = 2 if cu_seqlens is None else 0
    return [t.new_empty([*leading, *t.shape[token + 1 :]]) for t in payload[::layers]]


def _check_devices(tensors: list[Tensor], name: str, scores: list[Tensor], cu_seqlens: Tensor | None, rest=()) -> None:
    """As the kernels do: of tensors in two places, one is wrong."""
    device = (tensors or scores)[0].device
    named = [(f"{name}[{i}]", t) for i, t in enumerate(tensors)]
    named += [("scores" if len(scores) == 1 else f"scores[{i}]", t) for i, t in enumerate(scores)]
    named += [("cu_seqlens", cu_seqlens), *zip(("budgets", "", "lengths", "", "starts"), rest, strict=False)]
    for called, t in named:
        if isinstance(t, Tensor) and t.device != device:
            raise RuntimeError(f"ValueError: expected {called} on {device}, got {t.device}")


def _on(device: torch.device, tensors: dict[str, Tensor | None]) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise RuntimeError(f"ValueError: expected {name} on {device}, got {t.device}")


# The arguments are those of csrc/torch/arguments.h; `rest` begins with the integers.


@torch.library.register_fake("lkv_ext::select")
def _select(scores, budgets, total, padded=-1, count_overflow=False, cu_seqlens=None, batch=0, heads=0, *rest):
    _check_devices([], "", scores, cu_seqlens, rest)
    shape = _row_sets(scores, len(scores), cu_seqlens, batch, heads)
    return _index(scores[0], shape, total, padded, count_overflow)


@torch.library.register_fake("lkv_ext::evict")
def _evict(payload, scores, budgets, total, padded=-1, count_overflow=False, cu_seqlens=None, batch=0, heads=0, *rest):
    _check_devices(payload, "payload", scores, cu_seqlens, rest)
    shape = _row_sets(payload, len(scores), cu_seqlens, batch, heads)
    index = _index(payload[0], shape, total, padded, count_overflow)
    return _moved(payload, len(scores), cu_seqlens, list(index[0].shape)) + index


@torch.library.register_fake("lkv_ext::evict_plain")
def _evict_plain(k, v, scores, budgets, total):
    return tuple(_evict([k, v], [scores], budgets, total))


@torch.library.register_fake("lkv_ext::evict_")
def _evict_(payload, scores, budgets, total, padded=-1, count_overflow=False, cu_seqlens=None, batch=0, heads=0, *rest):
    _check_devices(payload, "payload", scores, cu_seqlens, rest)
    shape = _row_sets(payload, len(scores), cu_seqlens, batch, heads)
    index = _index(payload[0], shape, total, padded, count_overflow)
    return *index[:3], index[3] if count_overflow else payload[0].new_empty([0], dtype=torch.int32)


@torch.library.register_fake("lkv_ext::evict_out")
def _evict_out(out, payload, scores, budgets, total, padded=-1, count_overflow=False, cu_seqlens=None, *rest):
    _check_devices(payload, "payload", scores, cu_seqlens, rest[2:])
    moved = [f"out[{i}]" for i in range(len(payload) // max(len(scores), 1))]
    names = [*moved, "out.positions", "out.lengths", "out.cu_seqlens", "out.overflow"]
    _on(payload[0].device, dict(zip(names, out, strict=False)))


@torch.library.register_fake("lkv_ext::gather")
def _gather(tensors, positions, cu_seqlens, layers=1, source_cu_seqlens=None, *_):
    _check_devices(tensors, "payload", [], source_cu_seqlens)
    _on(tensors[0].device, {"index.positions": positions, "index.cu_seqlens": cu_seqlens})
    return _moved(tensors, layers, source_cu_seqlens, list(positions.shape))


@torch.library.register_fake("lkv_ext::append_")
def _append_(cache, positions, lengths, cu_seqlens, rows, position, valid=None, valid_tensor=None):
    _check_devices(rows, "payload", [], cu_seqlens)
    named = {"cache.positions": positions, "cache.lengths": lengths, "valid": valid_tensor}
    _on(rows[0].device, named | {f"cache[{i}]": t for i, t in enumerate(cache)})


@torch.library.register_fake("lkv_ext::attend")
def _attend(q, k, v, cu_seqlens, lengths, longest, causal, scale, softcap=0.0, sinks=None):
    _on(q.device, {"k": k, "v": v, "cu_seqlens": cu_seqlens, "lengths": lengths, "sinks": sinks})
    return q.new_empty([q.shape[0], q.shape[2], q.shape[1], v.shape[1]])


@torch.library.register_fake("lkv_ext::soft_topk")
def _soft_topk(scores, k, k_value, temperature, temperature_value, lengths, log):
    _on(scores.device, {"k": k, "temperature": temperature, "lengths": lengths})
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.new_empty(scores.shape, dtype=dtype), scores.new_empty(scores.shape[:-1], dtype=dtype)


@torch.library.register_fake("lkv_ext::soft_topk_backward")
def _soft_topk_backward(grad, mask, weights, temperature, temperature_value, lengths, element, log, *wanted):
    dtype = (torch.float32, torch.float16, torch.bfloat16, torch.float64)[element]
    to_scores, to_temperature = wanted
    return (
        mask.new_empty(mask.shape if to_scores else [0], dtype=dtype),
        mask.new_empty(weights.shape),
        mask.new_empty(weights.shape if to_temperature else [0]),
    )
