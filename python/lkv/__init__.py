"""lkv: learned KV-cache eviction on top of `lkv_ext`.

    cache = lkv.Cache(model, "snapkv", retention=0.15)
    model.generate(**inputs, past_key_values=cache)

transformers is loaded with `lkv.Cache`, and nothing before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lkv.hf.cache import Cache

__all__ = ["Cache"]


def __getattr__(name: str) -> object:
    if name != "Cache":
        raise AttributeError(f"module 'lkv' has no attribute {name!r}")
    try:
        from lkv.hf.cache import Cache
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ImportError(f"lkv.Cache needs {error.name}: pip install torch 'transformers>=4.56'") from None
    globals()[name] = Cache
    return Cache


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
