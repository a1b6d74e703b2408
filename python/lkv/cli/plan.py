"""`lkv plan`: what the KV cache of a model takes, in full and after eviction, and what fits."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import PretrainedConfig

from lkv import models
from lkv.memory import Footprint, Layer, footprint, measure_bandwidth

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
NAMES = {"full": "full attention", "sliding": "window of {}", "shared": "rows of another layer"}
NAMES |= {"recurrent": "recurrent state", "none": "no rows"}


def run(argv: Sequence[str]) -> int:
    options = parse(argv)
    config = models.config(options.model)
    found = footprint(config, options.dtype, options.page)
    bandwidth = options.bandwidth * 1e9 if options.bandwidth else measure_bandwidth(options.device)
    facts = plan(found, config, options, bandwidth)
    print(json.dumps(facts, indent=1) if options.json else report(facts))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    names = ", ".join(repr(name) for name in (models.RETRIEVER, *models.PACKAGED))
    parser = argparse.ArgumentParser(
        "lkv plan", description="Bytes of K and V in full and after eviction, and what fits; no weights are loaded."
    )
    parser.add_argument(
        "--model",
        required=True,
        help=f"{names}, a GGUF file, a config.json, a folder or a name that transformers knows",
    )
    parser.add_argument("--context", type=int, required=True, metavar="TOKENS", help="of every sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences, default %(default)s")
    parser.add_argument("--retention", type=float, default=0.15, help="share of the rows to keep, default %(default)s")
    parser.add_argument("--page", type=int, default=1, metavar="ROWS", help="of an engine; default: none, as lkv.Cache")
    parser.add_argument("--dtype", help="of K and V; default: that of the config, or else float32")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="of the device, as 80GB or 24GiB: then, what fits")
    parser.add_argument(
        "--weights",
        type=size,
        metavar="SIZE",
        help="off the memory; default: all parameters in the dtype of the config",
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="read and written; default: measured here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="here: %(default)s")
    parser.add_argument("--json", action="store_true", help="all numbers, in bytes and seconds")
    options = parser.parse_args(argv)
    for name in ("context", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"lkv plan: expected --{name} >= 1, got {getattr(options, name)}")
    if not 0 < options.retention <= 1:
        raise ValueError(f"lkv plan: expected --retention in (0, 1], got {options.retention}")
    if options.bandwidth is not None and not 0 < options.bandwidth < float("inf"):
        raise ValueError(f"lkv plan: expected --bandwidth > 0, got {options.bandwidth}")
    if options.weights is not None and options.memory is None:
        raise ValueError("lkv plan: expected --memory with --weights, got none")
    if options.dtype is not None:
        dtype = getattr(torch, options.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"lkv plan: expected a floating-point dtype of torch for --dtype, got {options.dtype!r}")
        options.dtype = dtype
    return options


def size(text: str) -> int:
    """Bytes of a size as 80GB (10^9 each) or 80GiB (2^30 each)."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a size as 80GB, 24GiB or a number of bytes, got {text!r}")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** UNITS[unit.lower()])


def plan(found: Footprint, config: PretrainedConfig, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """All numbers of the report. Bytes are of the whole batch.

    Raises:
        ValueError: for weights that do not fit the memory, or are not known.
    """
    context, batch, retention = options.context, options.batch, options.retention
    moved = batch * found.moved_bytes(context, retention)
    facts: dict[str, Any] = dict(
        model=options.model, model_type=found.model_type, dtype=str(found.dtype).removeprefix("torch."),
        context=context, batch=batch, retention=retention, page=found.page, limit=found.limit,
        layers=[_layer(found, layer, options) for layer in found.layers],
        full=batch * found.nbytes(context), kept=batch * found.nbytes(context, retention),
        full_waste=batch * found.waste(context), kept_waste=batch * found.waste(context, retention),
        reading=found.needed(context, batch, retention),
        eviction=dict(moved=moved, bandwidth=bandwidth, seconds=moved / bandwidth),
    )  # fmt: skip
    if options.memory is not None:
        weights = _weights(found, config) if options.weights is None else options.weights
        rest = options.memory - weights
        if rest <= 0:
            raise ValueError(
                f"lkv plan: expected --memory for more than the weights of {_bytes(weights)}, got "
                f"{_bytes(options.memory)}"
            )
        facts["fits"] = dict(
            memory=options.memory, weights=weights,
            longest=dict(full=found.longest(rest, batch), kept=found.longest(rest, batch, retention)),
            batch=dict(
                full=found.largest_batch(rest, context), kept=found.largest_batch(rest, context, retention)
            ),
        )  # fmt: skip
    return facts


def report(facts: dict[str, Any]) -> str:
    """The same as text."""
    paged = f", pages of {facts['page']} rows" if facts["page"] > 1 else ""
    lines = [
        f"{facts['model']} ({facts['model_type']}), K and V in {facts['dtype']}{paged}",
        f"{facts['batch']:,} x {facts['context']:,} tokens, retention {facts['retention']}",
        "",
    ]
    rows: list[tuple[str, ...]] = [("layers", "", "KV heads", "rows full", "kept", "bytes full", "kept", "page waste")]
    for kind, group in groupby(facts["layers"], lambda layer: {**layer, "index": None}):
        rows.append(_row([layer["index"] for layer in group], kind))
    total = [_bytes(facts[name]) for name in ("full", "kept", "kept_waste")]
    rows.append(("all", "", "", "", "", *total))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    eviction = facts["eviction"]
    milliseconds, rate = 1e3 * eviction["seconds"], eviction["bandwidth"] / 1e9
    lines += [
        "",
        f"While the last prompt is read: {_bytes(facts['reading'])}, as it is whole until its end.",
        f"Eviction moves {_bytes(eviction['moved'])} in all: {milliseconds:,.1f} ms at {rate:,.1f} GB/s; the time of "
        "scores comes on top.",
    ]
    if "fits" in facts:
        lines += _fits(facts, facts["fits"])
    return "\n".join(lines)


def _fits(facts: dict[str, Any], fits: dict[str, Any]) -> list[str]:
    longest, batch, (full, kept) = fits["longest"], fits["batch"], ("full", "kept")
    lines = [
        "",
        f"In {_bytes(fits['memory'])}, of which weights take {_bytes(fits['weights'])} and activations nothing here:",
        f"  longest context of {facts['batch']:,} sequences: {longest[full]:,} tokens in full, {longest[kept]:,} kept",
        f"  largest batch of {facts['context']:,} tokens: {batch[full]:,} in full, {batch[kept]:,} kept",
    ]
    if facts["limit"] is not None:
        lines.append(f"  the model is made for {facts['limit']:,} tokens")
    return lines


def _row(indices: list[int], layer: dict[str, Any]) -> tuple[str, ...]:
    where = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
    name = NAMES[layer["kind"]].format(layer["window"])
    if not layer["heads"]:
        return where, name, "", "", "", *(_bytes(layer[x]) if layer[x] else "" for x in ("full", "kept")), ""
    heads = f"{layer['heads']} x {layer['key_dim']}"
    if layer["value_dim"] != layer["key_dim"]:
        heads += f"+{layer['value_dim']}"
    rows = [f"{layer[name]:,}" for name in ("rows_full", "rows_kept")]
    return where, name, heads, *rows, *(_bytes(layer[x]) for x in ("full", "kept", "kept_waste"))


def _layer(found: Footprint, layer: Layer, options: argparse.Namespace) -> dict[str, Any]:
    context, batch, retention = options.context, options.batch, options.retention
    return dict(
        index=layer.index, kind=layer.kind, heads=layer.heads, key_dim=layer.key_dim, value_dim=layer.value_dim,
        window=layer.window, state=batch * layer.state_bytes,
        rows_full=layer.rows(context), rows_kept=layer.rows(context, retention),
        full=batch * found.layer_bytes(layer, context), kept=batch * found.layer_bytes(layer, context, retention),
        full_waste=batch * found.layer_waste(layer, context),
        kept_waste=batch * found.layer_waste(layer, context, retention),
    )  # fmt: skip


def _weights(found: Footprint, config: PretrainedConfig) -> int:
    parts = (config, config.get_text_config())  # of a model with several configs either may say it
    if any(getattr(part, "quantization_config", None) is not None for part in parts):
        raise ValueError("lkv plan: expected --weights SIZE for a model that is quantised, got none")
    return found.parameters * found.weight_dtype.itemsize


def _bytes(count: float) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):,.2f} {unit}"
    return f"{count:,.0f} B"
