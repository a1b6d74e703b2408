"""All that a `lkv.Cache` holds, as plain data to be compared: nothing is named here that a new field would miss."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping

import torch
from cases import bits
from torch import Tensor

import lkv
import lkv_ext
from lkv.hf.queries import LastQueries
from lkv.hf.settings import Settings
from lkv.hf.token_log import Rotary, TokenLog

# What leads back or to the model, where tensors lie, and how large a buffer is behind the rows.
SKIPPED = {"session", "_config", "_layers", "model", "_home", "device", "dtype", "last", "layer_class_to_replicate"}
ROWS = ("seen", "_tail", "align", "batch", "heads")


def snapshot(cache: lkv.Cache) -> dict[str, object]:
    """Every leaf by its path; tensors are copies."""
    return dict(_leaves(vars(cache), ""))


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Paths at which two snapshots are not the same."""
    return sorted(
        path for path in one.keys() | other.keys() if path not in one or path not in other or _differ(one, other, path)
    )


def _differ(one: dict[str, object], other: dict[str, object], path: str) -> bool:
    a, b = one[path], other[path]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype != b.dtype or not torch.equal(bits(a), bits(b))  # as NaN equals nothing
    return type(a) is not type(b) or a != b


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Tensor):
        yield path, value.detach().clone()
    elif isinstance(value, (LastQueries, TokenLog, lkv_ext.RaggedCache)):
        yield from _leaves(_contents(value), path)
    elif isinstance(value, Rotary):  # layers share it
        yield from _leaves({"cos": value.cos, "sin": value.sin}, path)
    elif isinstance(value, Settings) or (
        not hasattr(value, "__dict__") and not isinstance(value, (Mapping, list, tuple))
    ):
        yield path, value
    elif isinstance(value, (weakref.ref, type)):
        return
    else:
        parts = value if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else value
        parts = dict(parts) if isinstance(parts, Mapping) else dict(enumerate(parts))
        yield f"{path}()", sorted(map(str, parts.keys() - SKIPPED))
        for name, part in parts.items():
            if name not in SKIPPED:
                yield from _leaves(part, f"{path}.{name}")


def _contents(value: object) -> dict[str, object]:
    """The state in one form, whatever form it is held in; reading must not change it."""
    if isinstance(value, TokenLog):
        log = copy.deepcopy(value)
        return {"length": log.length, "all": log.read() if log.length else None}
    if isinstance(value, LastQueries):
        results = {"window": value.window, "seen": value.seen}
        if value.seen == 0:
            return results
        queries, places, there = copy.copy(value).read()
        kept = [[t[b][:, i] if t.dim() == 4 else t[b][i] for t in (queries, places)] for b, i in enumerate(there)]
        return results | {"kept": kept}
    results = {name: getattr(value, name) for name in ROWS}
    in_use = torch.arange(max(value.max_length, 1), device=value.lengths.device) < value.lengths[..., None]
    parts = (value.k, value.v, value.positions, *value.companions)
    return results | {
        "lengths": value.lengths,
        "rows": [value.padded(p)[in_use[..., : value.max_length]] for p in parts],
    }
