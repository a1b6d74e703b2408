"""LKV (arXiv 2605.06676): its modules, the policies made of them, and its checkpoints. `lkv train` trains it."""

from __future__ import annotations

from lkv.policies.lkv.head_budget import HeadBudget
from lkv.policies.lkv.policy import LKV, Learned, LKVThreshold, learned
from lkv.policies.lkv.token_scorer import TokenScorer

__all__ = ["LKV", "HeadBudget", "LKVThreshold", "Learned", "TokenScorer", "learned"]
