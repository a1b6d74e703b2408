"""Errors of the ops under their public names.

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
    """Raises what an op meant: its type and the public function `op`.

    For payload[i] it says `names[i]`; for out[i] the attribute `out[i]`, or else `names[i]`, of out. `given`: the
    arguments of the call, by name; where one is of another kind than it should be, the error says so.
    """
    text = _PREFIX.sub("", str(error))  # of a public function that another one calls
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
