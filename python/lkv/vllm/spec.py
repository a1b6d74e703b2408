"""The scheduler's side: which blocks of a request are free once its prompt has ended, and which may be shared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from lkv.vllm import metrics
from lkv.vllm.settings import OFF, Settings, dropped

_COUNTED: WeakSet[Any] = WeakSet()  # requests that have given back blocks


@dataclass(frozen=True, kw_only=True)
class EvictedSpec(FullAttentionSpec):
    """The cache of a layer whose prompt rows are evicted.

    Attributes:
        settings: of the engine.
        shares: what the heads of the layer keep as multiples of the retention: one number for all, or, where a head
            has blocks of its own, one for each.
    """

    settings: Settings
    shares: tuple[float, ...] = (1.0,)

    @property
    def tables(self) -> int:
        """Block tables of a request: one, or one per head."""
        return len(self.shares)

    def drops(self, prompt: int, retention: float) -> list[int]:
        """Rows that each table drops from its front when a prompt ends."""
        if retention >= OFF:
            return [0] * len(self.shares)
        return [dropped(prompt, share * retention, self.block_size) for share in self.shares]

    def reach(self, shortest: int, longest: int) -> int:
        """Tokens at the front that no eviction writes, of a prompt whose length is in this range.

        What is dropped grows with the prompt; shorter ones than `min_prompt` are not evicted.
        """
        evicted = max(shortest, self.settings.min_prompt)
        if longest < evicted or not any(self.drops(longest, self.settings.retention)):
            return longest
        return min(self.drops(evicted, self.settings.retention))

    def copy_with_new_block_size(self, block_size: int) -> EvictedSpec:
        """vLLM gives kernels smaller blocks than its scheduler has, where they take no others."""
        if block_size < self.block_size:
            raise ValueError(
                f"lkv.vllm: expected blocks that the attention kernel takes whole, got {self.block_size} tokens, of "
                f"which it takes {block_size}: set --block-size {block_size}"
            )
        return super().copy_with_new_block_size(block_size)

    @classmethod
    def merge(cls, specs: list[EvictedSpec]) -> EvictedSpec:
        assert all(spec == specs[0] for spec in specs), "layers that keep different numbers of rows share no blocks"
        return copy.deepcopy(specs[0])

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return int(super().max_memory_usage_bytes(vllm_config)) * self.tables

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        return int(super().max_num_blocks_per_req(vllm_config, max_len)) * self.tables


class EvictedManager(FullAttentionManager):
    """Frees the blocks in front of what is kept, as soon as the step in which a prompt ends has been processed.

    The worker has moved the kept rows behind `drop` by then (see `lkv.vllm.metadata`). Blocks in front of `drop` hold
    the prompt as it was: these alone are published to the prefix cache, and hits reach these alone, as the blocks
    behind are written.
    """

    def __init__(self, kv_cache_spec: EvictedSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.enable_caching = True  # so that `cache_blocks` is called, which gets the request
        self.requests: dict[str, Any] = {}

    def drops(self, request: Any) -> list[int]:
        settings, prompt = self.kv_cache_spec.settings, request.num_prompt_tokens
        params = request.sampling_params
        return list(self.kv_cache_spec.drops(prompt, settings.effective(prompt, params and params.extra_args)))

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        request = self.requests.get(request_id)
        if request is None or processed_computed_tokens < request.num_prompt_tokens:
            return
        freed = self._free_dropped(request_id, self.drops(request))
        metrics.BLOCKS.inc(freed)
        if freed > 0 and request not in _COUNTED:  # by another group of layers, or before it was preempted
            _COUNTED.add(request)
            metrics.PROMPTS.inc()

    def _free_dropped(self, request_id: str, drops: list[int]) -> int:
        """Blocks that were freed, none where it has been done."""
        free = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, 0, drops[0] // self.block_size)
        return int(self.block_pool.get_num_free_blocks() - free)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        if request.resumable:
            raise RuntimeError("lkv.vllm: expected a request whose prompt is complete, got one with streamed input")
        drop = min(self.drops(request))
        if request.request_id not in self.requests:
            self.requests[request.request_id] = request
            if 0 < drop < self.num_cached_block.get(request.request_id, 0) * self.block_size:
                raise RuntimeError("lkv.vllm: a request got blocks of others that its eviction would write")
        if self.block_pool.enable_caching:
            super().cache_blocks(request, min(num_tokens, drop) if drop else num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        request = self.requests.pop(request_id, None)
        if request is not None:  # a preempted request is longer than its prompt, from which the reach of hits is known
            request.skip_reading_prefix_cache = True
        return list(super().pop_blocks_for_free(request_id))

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, **kwargs: Any) -> Any:
        """Hits as far as the prompt is not written when it ends. Its hashes tell its length, to the block."""
        spec = kwargs["kv_cache_spec"]
        unit = kwargs["block_pool"].hash_block_size
        shortest = len(kwargs["block_hashes"]) * unit
        reach = spec.reach(shortest, shortest + unit - 1)
        return super().find_longest_cache_hit(*args, **{**kwargs, "max_length": min(kwargs["max_length"], reach)})


class EvictedHeadsManager(EvictedManager):
    """The same where every head has blocks of its own: block `j` of head `h` is at `j * H + h` of a request's table."""

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> int:
        assert not new_computed_blocks, "heads with blocks of their own have no prefix cache"
        return max(self._needed(num_tokens) - len(self.req_to_blocks.get(request_id, ())), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        blocks = self.req_to_blocks[request_id]
        count = self._needed(num_tokens) - len(blocks)
        if count <= 0:
            return []
        new = self.block_pool.get_new_blocks(count)
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return list(new)

    def _free_dropped(self, request_id: str, drops: list[int]) -> int:
        blocks, heads, freed = self.req_to_blocks[request_id], len(drops), []
        for head, drop in enumerate(drops):
            for at in range(head, drop // self.block_size * heads, heads):
                if blocks[at] == self._null_block:
                    break
                freed.append(blocks[at])
                blocks[at] = self._null_block
        self.block_pool.free_blocks(freed)
        return len(freed)

    def _needed(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self.block_size) * int(self.kv_cache_spec.tables)


@dataclass(frozen=True, kw_only=True)
class EvictedHeadsSpec(EvictedSpec):
    """The cache of a layer whose heads have blocks of their own: a block holds rows of one head."""


# vLLM registers its own specs only while nothing is registered.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(EvictedSpec, EvictedManager, uniform_type_base_spec=FullAttentionSpec)
KVCacheSpecRegistry.register(EvictedHeadsSpec, EvictedHeadsManager, uniform_type_base_spec=FullAttentionSpec)
