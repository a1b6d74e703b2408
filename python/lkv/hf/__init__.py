"""The Hugging Face side of lkv: `lkv.Cache` behind `generate`. Needs transformers from 4.56 on."""

from __future__ import annotations

from lkv.hf.cache import Cache

__all__ = ["Cache"]
