"""Counters in the registry of prometheus_client that vLLM's `/metrics` shows.

vLLM runs its engine in a process of its own: there, `/metrics` shows them where PROMETHEUS_MULTIPROC_DIR names an empty
folder, or with more than one API server, for which vLLM sets it.
"""

from __future__ import annotations

from prometheus_client import Counter

PROMPTS = Counter("lkv:evicted_prompts", "Prompts that gave back blocks when they ended.")
BLOCKS = Counter("lkv:freed_blocks", "Blocks of the KV cache that evicted prompts gave back.")
ROWS = Counter("lkv:evicted_rows", "Rows of keys and values that were dropped, over layers and KV heads.")
SECONDS = Counter(
    "lkv:eviction_seconds", "Time in eviction on CPUs, over layers: rows read, scored, selected, written."
)
