"""The kind of each argument of the public functions. Used once a call has failed, to name the argument at fault.

Imports neither torch nor NumPy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

Kind = Callable[[Any], bool]

PROTECTED = dict(lengths="integers?", starts="integers?", sink="count", window="count")
RANK = PROTECTED | dict(budgets="integers", max_budget="count?")
SPANS = dict(layout="text", capacity="count?", reserve="count", align="count")
DENSE = dict(k="array", v="array?", scores="array", companions="arrays", cu_seqlens="array?")
ATTEND = dict(q="array", scale="number?", softcap="number?", sinks="array?")

PAGED = dict(pools="arrays or lists of arrays", scores="array or arrays", tables="array", to="text", check="flag")
PAGED |= dict(budgets="integers", lengths="integers?", sink="count", window="count", max_budget="count?")
PAGED |= dict(companions="arrays or lists of arrays", companion_tables="arrays", order="text", threads="count?")
LAYERS = dict(ks="arrays", vs="arrays?", scores="array or arrays", companions="lists of arrays", out="RaggedKV?")

# By public function; an argument whose kind ends with "?" may be None.
SIGNATURES: dict[str, dict[str, str]] = {
    "evict": DENSE | RANK | SPANS | dict(out="RaggedKV?", threads="count?"),
    "evict_": DENSE | RANK | dict(to="text", page="count", order="text", threads="count?"),
    "evict_paged_": PAGED,
    "evict_layers": LAYERS | RANK | SPANS,
    "select": RANK | SPANS | dict(scores="array", cu_seqlens="array?", page="count", threads="count?"),
    "gather": dict(tensors="arrays", arrays="arrays", index="RaggedIndex", cu_seqlens="array?", threads="count?"),
    "plan": dict(budgets="integers", lengths="integers?", device="device?"),
    "attend": ATTEND | dict(cache="RaggedCache", causal="flag", backend="text?"),
    "soft_topk": dict(scores="array", k="numbers", temperature="numbers", lengths="integers?", log="flag"),
    "budgets_from_shares": dict(shares="numbers", total="count?", retention="number?", lengths="integers")
    | dict(floor="count", cap="count?"),
    "budgets_from_scores": PROTECTED | dict(scores="array or arrays", total="integers", across="text", floor="floor?"),
    "Blend": dict(alpha="number"),
    "Minimum": dict(rows="count"),
    "RaggedKV.layer": dict(i="count"),
    "RaggedCache": dict(kv="RaggedKV", seen="count", free="count?", tail="count"),
    "RaggedCache.append": dict(k="array", v="array", companions="arrays", valid="integers?"),
    "RaggedCache.evict": RANK | dict(scores="array", reserve="count?"),
    "RaggedCache.crop": dict(tokens="count"),
    "RaggedCache.restore": dict(mark="integers", rows="integers"),
    "RaggedCache.select_batch": dict(indices="integers"),
    "RaggedCache.reorder": dict(beams="integers"),
    "RaggedCache.padded": dict(rows="array"),
    "RaggedCache.packed": dict(scores="array"),
    "RaggedCache.to": dict(device="device"),
    "RaggedCache.load": dict(device="device"),
    "PagedCache.append": dict(k="array", v="array", companions="arrays"),
    "PagedCache.evict": dict(scores="array", budgets="integers", sink="count", window="count"),
}

# The fields of what evict, select and their relatives return.
FIELDS = dict(k="array", v="array?", companions="arrays", positions="array", lengths="array", cu_seqlens="array")
FIELDS |= dict(max_length="rows", overflow="array?")


def described(value: Any) -> str:
    """A value in one short line, for a message."""
    if _is_tensor(value):
        trouble = _trouble(value)
        shape = "" if trouble == "nested" else f" of shape {list(value.shape)}"
        return f"a {trouble + ' ' if trouble else ''}tensor{shape} and {value.dtype}"
    if _is_numpy(value) and getattr(value, "shape", None):
        return f"an array of shape {list(value.shape)} and {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) < 100 else f"{type(value).__name__} {text[:80]} ..."


def _is_tensor(value: Any) -> bool:
    return hasattr(type(value), "untyped_storage")


def _is_numpy(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "numpy"


def _trouble(tensor: Any) -> str:
    """Why a tensor has no memory that its sizes and strides describe; "" if it has."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    return "" if str(tensor.layout) == "torch.strided" else str(tensor.layout).removeprefix("torch.")


def _tensor(value: Any) -> bool:
    return _is_tensor(value) and not _trouble(value)


def _ndarray(value: Any) -> bool:
    return _is_numpy(value) and hasattr(value, "strides")


def _sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _all(fits: Kind) -> Kind:
    return lambda value: _sequence(value) and all(map(fits, value))


def _either(one: Kind, other: Kind) -> Kind:
    return lambda value: one(value) or other(value)


def _has(value: Any, *kinds: str) -> bool:
    return any(kind in str(getattr(value, "dtype", "")) for kind in kinds)


def _count(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and not _has(value, "bool") and operator.index(value) is not None
    except (TypeError, RuntimeError):
        return False


def _integers(value: Any) -> bool:
    if type(value).__name__ == "Plan":
        return True
    if _is_tensor(value) or _ndarray(value):
        readable = _ndarray(value) or (not _trouble(value) and not value.is_meta)
        return readable and not _has(value, "float", "complex", "bool", "object", "str", "<U")
    return all(map(_integers, value)) if _sequence(value) else _count(value)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _numbers(value: Any) -> bool:
    if _is_tensor(value) or _ndarray(value):
        readable = _ndarray(value) or (not _trouble(value) and not value.is_meta)
        return readable and not _has(value, "complex", "bool", "object", "str", "<U")
    return all(map(_numbers, value)) if _sequence(value) else _number(value)


def _named(*names: str) -> Kind:
    return lambda value: type(value).__name__ in names


KINDS: dict[str, tuple[Kind, str]] = {
    "integers": (_integers, "as an int, a sequence of ints or a tensor of integers"),
    "count": (_count, "as an int"),
    "rows": (lambda value: _count(value) and operator.index(value) < 2**31, "as an int below 2**31"),
    "number": (_number, "as a number"),
    "numbers": (_numbers, "as a number, numbers or a tensor of a real dtype"),
    "flag": (lambda value: isinstance(value, bool), "as a bool"),
    "text": (lambda value: isinstance(value, str), "as a string"),
    "device": (lambda value: isinstance(value, str) or _named("device")(value), "as a torch.device or its name"),
    "floor": (_named("Blend", "Minimum"), "as a Blend or Minimum"),
    "RaggedKV": (_named("RaggedKV"), "as a RaggedKV"),
    "RaggedIndex": (_named("RaggedIndex", "PagedIndex", "RaggedKV"), "as a RaggedIndex"),
    "RaggedCache": (
        lambda value: hasattr(value, "cu_seqlens") or hasattr(value, "tables"),
        "as a RaggedCache or RaggedKV",
    ),
}
for _one, _fits, _word, _a in (("array", _ndarray, "array", "an"), ("tensor", _tensor, "dense tensor", "a")):
    KINDS[_one] = _fits, f"as {_a} {_word}"
    KINDS[f"{_one}s"] = _all(_fits), f"as a sequence of {_word}s"
    KINDS[f"{_one} or {_one}s"] = _either(_fits, _all(_fits)), f"as {_a} {_word}, or a sequence of them"
    KINDS[f"lists of {_one}s"] = _all(_all(_fits)), f"as sequences of {_word}s, one per layer"
    _of_any = _either(_all(_fits), _all(_all(_fits)))
    KINDS[f"{_one}s or lists of {_one}s"] = _of_any, f"as a sequence of {_word}s, or of one sequence per layer"


def is_of(kind: str, value: Any) -> bool:
    return KINDS[kind][0](value)


def fault(op: str, given: Mapping[str, object]) -> tuple[str, str] | None:
    """The first argument of `op` that is of a wrong kind, with the message for it; None: there is none."""
    word = "array" if op.startswith("numpy.") else "tensor"
    for name, kind in SIGNATURES.get(op.removeprefix("numpy."), {}).items():
        if name not in given:
            continue
        wrong = _misfit(name, given[name], kind, word)
        if wrong is None and kind.startswith("Ragged") and given[name] is not None:
            parts = [(f"{name}.{part}", getattr(given[name], part, None), of) for part, of in FIELDS.items()]
            known = [part for part in parts if hasattr(given[name], part[0].split(".")[1])]
            wrong = next(filter(None, (_misfit(*part, word) for part in known)), None)
        if wrong is not None:
            return wrong
    return None


def _misfit(name: str, value: Any, kind: str, word: str) -> tuple[str, str] | None:
    optional = kind.endswith("?")
    fits, form = KINDS[kind.rstrip("?").replace("array", word)]
    if fits(value) or (optional and value is None):
        return None
    return name, f"expected {name} {form}{' or None' if optional else ''}, got {described(value)}"


def guess(given: Mapping[str, Any] | None) -> str:
    """A hint where scores do not fit k: the axes of tokens and heads are easily confused."""
    if not given or given.get("cu_seqlens") is not None:
        return ""
    for k, first in (("k", lambda x: x), ("ks", lambda x: x[0])):
        if k not in given or "scores" not in given:
            continue
        try:
            rows, scores = (list(first(given[name]).shape) for name in (k, "scores"))
        except (RuntimeError, TypeError, LookupError, AttributeError):  # these are wrong themselves
            continue
        if len(rows) == 4 and len(scores) == 3 and rows[1] != rows[2] and scores == [rows[0], rows[2], rows[1]]:
            return f" (scores fit {k} if it were [B, L, H, D]: pass it with transpose(1, 2), or swapaxes of NumPy)"
    return ""
