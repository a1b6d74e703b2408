"""A cache as plain data: for files, pickles and copies in other processes, checked on the way in."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

import lkv_ext
from lkv import policies
from lkv.hf.calls import Calls
from lkv.hf.layer import RaggedLayer
from lkv.hf.settings import Settings
from lkv.hf.token_log import Rotary, TokenLog
from lkv.hf.versions import HFLayer, own_layers
from lkv.policies.base import accumulator

FORMAT = 1
COUNTS = ("evicted", "evictions", "due", "scaling", "softcap", "sinks")
State = dict[str, Any]  # of tensors, numbers, texts, and dicts and lists of these
# Attributes of a layer that are stored as they are, by their names in the file.
_PLAIN = {name: name for name in (*COUNTS, "keys", "values")} | {"token_counts": "real", "row_counts": "held"}


def state_of(cache: Calls) -> State:
    """Nested dicts and lists of tensors, numbers and texts: all of a cache but its model and settings."""
    history = cache.history
    rotaries = history.rotations.all
    return {
        "explicit": cache.explicit,
        "token_by_token": cache.token_by_token,
        "hidden": history.hidden,
        "places": history.places,
        "rotaries": [{"cos": r.cos.read(), "sin": r.sin.read()} for r in rotaries],
        "layers": [
            _of_ragged(layer, rotaries) if isinstance(layer, RaggedLayer) else _of_other(layer)
            for layer in cache.layers
        ],
    }


def restore(cache: Calls, state: State, device: torch.device | str | None = None) -> None:
    """Makes an empty cache what `state_of` gave.

    Raises:
        ValueError, TypeError: where it does not fit the model, or itself; the cache must not be used then.
    """
    history, state = cache.history, _moved(state, device)
    try:
        cache.explicit, cache.token_by_token = bool(state["explicit"]), bool(state["token_by_token"])
        history.hidden, history.places = state["hidden"], state["places"]
        history.rotations.load([(r["cos"], r["sin"]) for r in state["rotaries"]])
        layers = state["layers"]
        _expect(len(layers) == len(cache.layers), f"{len(cache.layers)} layers", len(layers))
        for layer, given in zip(cache.layers, layers, strict=True):
            if isinstance(layer, RaggedLayer):
                _into_ragged(layer, given)
            else:
                _into_other(layer, given)
        _check_together(cache)
    except (KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"lkv.Cache.load: expected the state of a cache, got one without {error}") from None


def save(cache: Calls, path: str | PathLike[str]) -> None:
    """One safetensors file; all that is no tensor is JSON in its metadata."""
    tensors: dict[str, Tensor] = {}
    record = {
        "format": FORMAT,
        "model": fingerprint(cache._config),
        "settings": _of_settings(cache.settings),
        "state": _without_tensors(state_of(cache), "", tensors),
    }
    part = f"{os.fspath(path)}.part"
    save_file(tensors, part, {"lkv": json.dumps(record)})
    os.replace(part, path)


def load(
    path: str | PathLike[str], config: PretrainedConfig, policy: str | policies.Policy | None
) -> tuple[Settings, State]:
    """What `save` wrote, for a decoder of this config; `policy` in the place of one that files cannot hold.

    Raises:
        ValueError: for a file that is truncated, of another kind, or of another model.
    """
    path = os.fspath(path)
    try:
        with safe_open(path, "pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            record = json.loads((file.metadata() or {})["lkv"])
        _expect(record["format"] == FORMAT, f"format {FORMAT}", record["format"])
        mine, its = fingerprint(config), record["model"]
        differing = [f"{name} {its.get(name)}, got {mine[name]}" for name in mine if its.get(name) != mine[name]]
        _expect(not differing, f"a model of {'; '.join(differing)}", "another")
        settings = record["settings"]
        stored = settings.pop("policy")
        if policy is None and stored is None:
            raise ValueError("lkv.Cache.load: expected policy=, as files cannot hold the one that was used, got none")
        settings["policy"] = policies.get(policy) if policy is not None else _policy(stored)
        settings["observe"] = frozenset(settings["observe"])
        made = Settings(**settings)
        made.check_needs()
        return made, _with_tensors(record["state"], tensors)
    except (SafetensorError, KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(
            f"lkv.Cache.load: expected a cache that lkv.Cache.save wrote in {path}, got: {error}"
        ) from None


def fingerprint(config: PretrainedConfig) -> State:
    """What has to be the same for rows to fit a model."""
    names = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
    kinds = [type(layer).__name__ for layer in own_layers(config)]
    known = config.to_dict()
    return {name: known.get(name) for name in names} | {"layers": kinds}


# A layer.


def _of_ragged(layer: RaggedLayer, rotaries: list[Rotary]) -> State:
    observations = layer.observations
    return {key: getattr(layer, name) for name, key in _PLAIN.items()} | {
        "rows": None if layer.rows is None else layer.rows.__getstate__() | {"companions": list(layer.rows.companions)},
        "queries": None if observations.queries is None else observations.queries.state(),
        "all_queries": None if observations.all_queries is None else observations.all_queries.state(),
        "carried_heads": layer.carried_heads,
        "cosines": _read(observations.cosines),
        "hidden_states": _read(observations.hidden_states),
        "rotary": rotaries.index(observations.rotary) if observations.rotary in rotaries else None,
    }


def _read(log: TokenLog | None) -> Tensor | None:
    return log.read() if log is not None and log.length else None


def _into_ragged(layer: RaggedLayer, state: State) -> None:
    for name, key in _PLAIN.items():
        setattr(layer, name, state[key])
    tokens, rows_now = layer.token_counts, layer.row_counts
    whole = len(tokens) == len(rows_now) and all(type(n) is int for n in tokens + rows_now)
    _expect(whole, "as many counts of tokens as of rows", [tokens, rows_now])
    if state["rows"] is not None:
        rows = object.__new__(lkv_ext.RaggedCache)
        rows.__setstate__(state["rows"] | {"companions": tuple(state["rows"]["companions"])})
        layer.rows = rows
        _expect(rows.batch == len(tokens) and layer.keys is None, f"rows of {len(tokens)} sequences", rows.batch)
        if accumulator(layer.settings.policy) is None:  # those of another policy
            rows.companions = ()
        _expect(rows.lengths.sum(1).tolist() == rows_now, f"{rows_now} rows", rows.lengths.sum(1).tolist())
    elif layer.keys is not None:
        keys, values = layer.whole()
        _expect(keys.dim() == 4 == values.dim() and keys.shape[:3] == values.shape[:3], "keys as values", keys.shape)
        _expect(keys.shape[0] == len(tokens), f"keys of {len(tokens)} sequences", keys.shape[0])
        _expect(
            rows_now == [n * keys.shape[1] for n in tokens], f"{rows_now} rows", [n * keys.shape[1] for n in tokens]
        )
    length = layer.get_seq_length()
    _expect(all(0 <= n <= length for n in tokens), f"sequences of at most {length} tokens", tokens)
    _expect(0 <= layer.evicted <= length, f"an eviction within {length} tokens", layer.evicted)
    layer.is_initialized = length > 0
    observations = layer.observations
    if observations.queries is not None and state["queries"] is not None:
        observations.queries.load(state["queries"], len(tokens), length)
    if observations.all_queries is not None:
        observations.all_queries.load(state.get("all_queries"), len(tokens), length)
    layer.carried_heads = heads = state.get("carried_heads") if accumulator(layer.settings.policy) else None
    _expect(heads is None or heads.shape[:2] == (len(tokens), layer.heads), "sums of heads [B, H, n]", heads)
    for name, log in (("hidden_states", observations.hidden_states), ("cosines", observations.cosines)):
        known = state.get(name)
        if log is not None and known is not None:
            _expect(known.dim() == 3 and known.shape[1] == length, f"{name} of {length} tokens", known.shape)
            log.push(known)
    if state["rotary"] is not None:
        observations.rotary = layer.rotations.all[state["rotary"]]


def _of_other(layer: HFLayer) -> State:
    """transformers' own: its attributes, which are tensors, numbers, and dicts of both by number."""
    kept = {k: v for k, v in vars(layer).items() if not isinstance(v, (torch.device, torch.dtype))}
    return {name: list(value.values()) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _into_other(layer: HFLayer, state: State) -> None:
    tensors = [t for value in state.values() for t in (value if isinstance(value, list) else [value])]
    first = next((t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), None)
    for name, value in state.items():
        if name not in vars(layer):
            raise ValueError(f"lkv.Cache.load: expected attributes of {type(layer).__name__}, got {name}")
        old = vars(layer)[name]
        setattr(layer, name, dict(enumerate(value)) if isinstance(old, Mapping) else value)
    if first is not None:
        vars(layer).update(device=first.device, dtype=first.dtype)


def _check_together(cache: Calls) -> None:
    history = cache.history
    lengths = {layer.get_seq_length() for layer in cache.ragged}
    batches = {len(layer.token_counts) for layer in cache.ragged}
    _expect(len(lengths) == 1 and len(batches) == 1, "layers of one length and batch", [lengths, batches])
    (length,), (batch,) = lengths, batches
    for name, t, dtype in (("hidden", history.hidden, torch.bool), ("places", history.places, torch.int64)):
        right = t is None or (t.dtype == dtype and tuple(t.shape) == (batch, length))
        _expect(right, f"{name} as {dtype} {[batch, length]}", t)
    if history.places is not None and length:
        low, high = int(history.places.min()), int(history.places.max())
        _expect(low >= 0 and high < length, f"places in [0, {length})", [low, high])


# Settings and policies.


def _of_settings(settings: Settings) -> State:
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return fields | {"observe": sorted(settings.observe), "policy": _of_policy(settings.policy)}


def _of_policy(policy: object) -> State | None:
    """By the name and fields of its class, if it is one of `lkv.policies` and holds plain data; else None."""
    kind = type(policy)
    if getattr(policies, kind.__name__, None) is not kind or not dataclasses.is_dataclass(policy):
        return None
    fields = {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if not isinstance(value, (int, float, str, type(None))):
            value = _of_policy(value)
            if value is None:
                return None
        fields[field.name] = value
    return {"class": kind.__name__, "fields": fields}


def _policy(state: State) -> policies.Policy:
    _expect(state["class"] in policies.__all__, "a policy of lkv.policies", state["class"])
    fields = {name: _policy(v) if isinstance(v, dict) else v for name, v in state["fields"].items()}
    return policies.get(getattr(policies, state["class"])(**fields))


# Tensors in and out of nested data.


def _mapped(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _mapped(v, change, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_mapped(v, change, f"{name}.{i}") for i, v in enumerate(value)]
    return change(name, value)


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    def change(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors[path] = leaf.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}

    return _mapped(value, change, name)


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {k: _with_tensors(v, tensors) for k, v in value.items()}
    return [_with_tensors(v, tensors) for v in value] if isinstance(value, list) else value


def _moved(value: State, device: torch.device | str | None) -> State:
    return _mapped(value, lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) and device is not None else leaf)


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"lkv.Cache.load: expected {expected}, got {got}")
