"""Errors of the ops under their public names.

C++ exceptions cross the stable ABI as RuntimeError with the Python type at the start of the message. Nothing here runs
unless an op has failed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

_TYPES = {cls.__name__: cls for cls in (ValueError, TypeError, RuntimeError, MemoryError)}
_MESSAGE = re.compile(rf"({'|'.join(_TYPES)}): (.*)", re.DOTALL)


def reraise(op: str, error: Exception, names: Sequence[str] = ()) -> NoReturn:
    """Raises what an op meant: its type, the public function `op`, and `names[i]` where it says payload[i] or out[i]."""
    text = str(error)
    match = _MESSAGE.match(text)
    if match is None:
        # The dispatcher refused an argument before the op saw it.
        cls = TypeError if "Expected a value of type" in text else type(error)
        raise cls(f"lkv_ext.{op}: {text}") from None
    cls, message = _TYPES[match[1]], match[2]
    message = re.sub(r"payload\[(\d+)\]", lambda m: names[int(m[1])], message)
    raise cls(f"lkv_ext.{op}: {message.split(' (originally from')[0]}") from None
