"""The Hugging Face side of lkv: `lkv.Cache` for `generate`. Needs transformers 4.56 or later."""

from __future__ import annotations

from lkv.hf.cache import Cache

__all__ = ["Cache"]
