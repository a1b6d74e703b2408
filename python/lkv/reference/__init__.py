"""The specification of every op of lkv_ext in plain PyTorch: a stable sort, and loops where they are clearer.

It is slow. It imports nothing compiled and runs on CPU and CUDA tensors. `lkv.reference.policies` has the methods.
"""

from lkv.reference.attend import attend
from lkv.reference.budgets import budgets_from_scores, budgets_from_shares
from lkv.reference.evict import evict, evict_, evict_layers, evict_paged_
from lkv.reference.gather import gather
from lkv.reference.select import select, select_row
from lkv.reference.soft_topk import soft_topk
from lkv.reference.spans import Spans, spans

__all__ = [
    "Spans",
    "attend",
    "budgets_from_scores",
    "budgets_from_shares",
    "evict",
    "evict_",
    "evict_layers",
    "evict_paged_",
    "gather",
    "select",
    "select_row",
    "soft_topk",
    "spans",
]
