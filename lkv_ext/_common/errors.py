"""Errors of the ops, with public names.

C++ exceptions cross the stable ABI as RuntimeError with the Python type at the start of the message. Nothing here runs
unless an op has failed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from lkv_ext._common.kinds import fault, guess

_TYPES = {cls.__name__: cls for cls in (ValueError, TypeError, RuntimeError, MemoryError)}
_MESSAGE = re.compile(rf"({'|'.join(_TYPES)}): (.*)", re.DOTALL)
_PREFIX = re.compile(r"^lkv_ext\.[\w.]+: ")
_REFUSED = re.compile(r"Expected a value of type '([^']+)' for argument '(\w+)' but instead found type '([^']+)'")


def reraise(
    op: str,
    error: Exception,
    names: Sequence[str] = (),
    out: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
) -> NoReturn:
    """Raises an error of an op with its Python type, the public function `op` and the names of its arguments.

    Args:
        names: for `payload[i]` in the message.
        out: attributes of the argument `out` for `out[i]`; default: `names`.
        given: the arguments of the call, by name: one of a wrong kind is named.
    """
    text = _PREFIX.sub("", str(error))  # another public function was called
    wrong = fault(op, given or {})
    if wrong is not None and not ("expected " in text and re.search(rf"\b{wrong[0]}\b", text)):
        raise TypeError(f"lkv_ext.{op}: {wrong[1]}") from None
    refused = _REFUSED.search(text)
    if refused is not None:  # the dispatcher, before the op saw it
        raise TypeError(f"lkv_ext.{op}: expected {refused[2]} as {refused[1]}, got {refused[3]}") from None
    match = _MESSAGE.match(text)
    if match is None:
        cls = TypeError if isinstance(error, AttributeError) else type(error)  # something else than a tensor
        raise cls(f"lkv_ext.{op}: {text}{guess(given)}") from None
    cls, message = _TYPES[match[1]], match[2]
    message = re.sub(r"payload\[(\d+)\]", lambda m: names[int(m[1])], message)
    message = re.sub(r"\bout\[(\d+)\]", lambda m: f"out.{(out or names)[int(m[1])]}", message)
    raise cls(f"lkv_ext.{op}: {message.split(' (originally from')[0]}{guess(given)}") from None
