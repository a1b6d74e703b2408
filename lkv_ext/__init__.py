"""lkv_ext: KV cache eviction that frees memory: per-head top-k, with its own k for every head, fused with the
compaction of K and V.

    out = lkv_ext.evict(k, v, scores, budgets)

torch is loaded with the first function that needs it: `lkv_ext.numpy` and `lkv_ext.build_info` work without it.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from lkv_ext._common.unbuilt import missing

if TYPE_CHECKING:
    from lkv_ext._torch.attend import attend
    from lkv_ext._torch.budgets import Blend, Minimum, budgets_from_scores, budgets_from_shares
    from lkv_ext._torch.evict import evict, evict_, evict_layers
    from lkv_ext._torch.gather import gather
    from lkv_ext._torch.ints import plan
    from lkv_ext._torch.paged import evict_paged_
    from lkv_ext._torch.select import select
    from lkv_ext._torch.soft_topk import soft_topk
    from lkv_ext.cache import RaggedCache
    from lkv_ext.paged_cache import PageAllocator, PagedCache
    from lkv_ext.ragged import PagedIndex, RaggedIndex, RaggedKV

_HOME = {
    "evict": "_torch.evict",
    "evict_": "_torch.evict",
    "evict_layers": "_torch.evict",
    "evict_paged_": "_torch.paged",
    "select": "_torch.select",
    "gather": "_torch.gather",
    "plan": "_torch.ints",
    "budgets_from_scores": "_torch.budgets",
    "budgets_from_shares": "_torch.budgets",
    "Blend": "_torch.budgets",
    "Minimum": "_torch.budgets",
    "RaggedKV": "ragged",
    "RaggedIndex": "ragged",
    "PagedIndex": "ragged",
    "RaggedCache": "cache",
    "PagedCache": "paged_cache",
    "PageAllocator": "paged_cache",
    "attend": "_torch.attend",
    "soft_topk": "_torch.soft_topk",
}

__all__ = ["Blend", "Minimum", "PageAllocator", "PagedCache", "PagedIndex", "RaggedCache", "RaggedIndex", "RaggedKV"]
__all__ += [
    "attend",
    "budgets_from_scores",
    "budgets_from_shares",
    "build_info",
    "evict",
    "evict_",
    "evict_layers",
    "evict_paged_",
    "gather",
    "plan",
    "select",
    "soft_topk",
]


def build_info() -> dict[str, object]:
    """What this build is made of and what it runs on.

    Keys: version, cxx_compiler, cpu_isa (in use: avx512, avx2 or portable), cuda_compiler, cuda_archs and cuda_driver,
    the oldest NVIDIA driver that the kernels run on, as "580" (None: no CUDA kernels), torch_built_against and
    torch_abi_target (None: no torch ops).
    """
    return _kernels().build_info()


def _kernels() -> ModuleType:
    """The module of the NumPy front end."""
    try:
        return import_module("lkv_ext._C")
    except ModuleNotFoundError:
        raise missing("the module _C", "install lkv-ext again") from None


def __getattr__(name: str) -> object:
    if name == "__version__":
        return build_info()["version"]
    if name == "_C":
        return _kernels()
    if name not in _HOME:
        raise AttributeError(f"module 'lkv_ext' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"lkv_ext.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"lkv_ext.{name} needs torch: pip install torch; lkv_ext.numpy does without") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
