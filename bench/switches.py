"""Calls with a choice of kernels made for them, which csrc/cuda/tuning.h reads from the environment at every launch."""

from __future__ import annotations

import os

from timing import Call


def switched(call: Call, variable: str, value: str) -> Call:
    """The same call where `variable` is `value`; a graph of it keeps what was chosen when it was captured."""

    def chosen() -> object:
        before = os.environ.get(variable)
        os.environ[variable] = value
        try:
            return call()
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before

    return chosen
