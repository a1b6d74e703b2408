"""Policies: what to keep. One file per method, all on the protocol of `lkv.policies.protocol`.

policy = lkv.policies.get("adakv")        # or AdaKV(SnapKV(window=64), alpha=0.1)
"""

from __future__ import annotations

from lkv.policies.adakv import AdaKV
from lkv.policies.kvzip import KVzip, Repetition
from lkv.policies.protocol import NEEDS, SCOPES, Ahead, Observation, Policy
from lkv.policies.random import Random
from lkv.policies.registry import POLICIES, get, names
from lkv.policies.snapkv import SnapKV
from lkv.policies.streaming_llm import StreamingLLM

__all__ = [
    "NEEDS",
    "POLICIES",
    "SCOPES",
    "AdaKV",
    "Ahead",
    "KVzip",
    "Observation",
    "Policy",
    "Random",
    "Repetition",
    "SnapKV",
    "StreamingLLM",
    "get",
    "names",
]
