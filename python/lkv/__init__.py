"""lkv: learned KV-cache eviction on top of `lkv_ext`.

    cache = lkv.Cache(model, "snapkv", retention=0.15)
    model.generate(**inputs, past_key_values=cache)

    cache = lkv.Cache(model, lkv.load("folder of lkv train", model), retention=0.15)

    cache = lkv.compress(model, document, "kvzip", retention=0.15)  # read once, asked often

transformers is loaded with these, and nothing before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lkv.compression import compress
    from lkv.hf.cache import Cache
    from lkv.policies.lkv.checkpoint import load

__all__ = ["Cache", "compress", "load"]
_HOMES = {"Cache": "lkv.hf.cache", "compress": "lkv.compression", "load": "lkv.policies.lkv.checkpoint"}


def __getattr__(name: str) -> object:
    if name == "__version__":  # the two packages are one distribution
        return import_module("lkv_ext").__version__
    if name in ("models", "policies"):
        return import_module(f"lkv.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lkv' has no attribute {name!r}")
    try:
        found = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ImportError(f"lkv.{name} needs {error.name}: pip install torch 'transformers>=4.56'") from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
