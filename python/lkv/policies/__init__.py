"""Policies: what to keep. One file per method, all on the protocol of `lkv.policies.protocol`.

policy = lkv.policies.get("adakv")        # or AdaKV(SnapKV(window=64), alpha=0.1)
"""

from __future__ import annotations

from collections.abc import Callable

from lkv.policies.adakv import AdaKV
from lkv.policies.kvzip import KVzip
from lkv.policies.protocol import NEEDS, SCOPES, Ahead, Observation, Policy
from lkv.policies.random import Random
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
    "SnapKV",
    "StreamingLLM",
    "get",
]

POLICIES: dict[str, Callable[[], Policy]] = {
    "adakv": AdaKV,
    "kvzip": KVzip,
    "random": Random,
    "snapkv": SnapKV,
    "streaming_llm": StreamingLLM,
}


def get(policy: str | Policy) -> Policy:
    """A policy by its name, with its defaults, or the object itself.

    Raises:
        ValueError: for a name that is not known, needs or a scope that are not.
        TypeError: for an object without the attributes and methods of the protocol.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"lkv.policies: expected one of {', '.join(sorted(POLICIES))}, got {policy!r}")
        return POLICIES[policy]()
    early = isinstance(policy, Ahead) and getattr(policy, "scope", None) == "layer"  # its budgets are known before
    members = ("needs", "scope", "sink", "window", "score", *(() if early else ("budgets",)))
    missing = [name for name in members if not hasattr(policy, name)]
    if isinstance(policy, type) or missing:
        lack = f" without {', '.join(missing)}" if missing else ""
        raise TypeError(f"lkv.policies: expected a name or a policy, got {policy!r}{lack}")
    if policy.scope not in SCOPES or not policy.needs <= NEEDS:
        raise ValueError(
            f"lkv.policies: expected a scope of {', '.join(SCOPES)} and needs of {', '.join(sorted(NEEDS))}, "
            f"got {policy.scope!r} and {sorted(policy.needs)}"
        )
    return policy
