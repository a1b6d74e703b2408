"""Eviction in transformers' continuous batching: every prompt is evicted in the pool when it has been read.

    from lkv.hf import batching

    answers = batching.generate_batch(model, prompts, "knorm", retention=0.25, max_new_tokens=64)

The pool's blocks hold a page of every layer, and a page all heads: heads keep rows of their own, but all as many. The
kept rows move to the last blocks of their request (`evict_paged_` with to="back"), and the first blocks return to the
pool. To transformers the request is shorter from then on; only its positions count on from the whole prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

try:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache, group_layers_by_attn_type
    from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION, FullAttentionCacheAllocator
    from transformers.generation.continuous_batching.continuous_api import (
        ContinuousBatchingManager,
        ContinuousBatchProcessor,
    )
    from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
    from transformers.generation.continuous_batching.requests import (
        FutureRequestState,
        GenerationOutput,
        RequestState,
        RequestStatus,
    )
    from transformers.generation.continuous_batching.utils import WorkloadHints, stream_context
except ImportError as error:
    raise ImportError(
        f"lkv.hf.batching: expected transformers 5.19 or later, whose pool and scheduler can be followed, got "
        f"{transformers.__version__}: {error}"
    ) from None

import lkv_ext
from lkv import policies
from lkv.hf.compat import find_decoder
from lkv.policies.protocol import Observation, Policy, Refines
from lkv_ext import layout

SUPPLIED = frozenset({"budget"})  # needs that can be met with what the pool holds


@dataclass
class Eviction:
    """What is kept of every prompt, and what that has freed so far.

    Attributes:
        policy: its scores choose the rows of every head; its budgets are not used.
        retention, budget: rows that every head keeps, as in `lkv.Cache`; one of them. What is kept beyond them, so that
            whole blocks are dropped, is the next best by score.
        prompts, freed_blocks: prompts read, and blocks that went back to the pool before their request had ended.
    """

    policy: Policy
    retention: float | None
    budget: int | None
    prompts: int = 0
    freed_blocks: int = 0

    def __post_init__(self) -> None:
        missing = sorted(self.policy.needs - SUPPLIED)
        _expect(not missing, "a policy that scores by keys and values alone", f"one that needs {', '.join(missing)}")
        given = [value for value in (self.retention, self.budget) if value is not None]
        _expect(len(given) == 1, "one of retention and budget", "both" if given else "none of them")
        _expect(self.retention is None or 0 < self.retention <= 1, "retention in (0, 1]", self.retention)
        _expect(self.budget is None or self.budget >= 1, "budget >= 1", self.budget)

    def target(self, length: int) -> int:
        """Rows per head to keep of a prompt of so many tokens."""
        rows = max(1, round(self.retention * length)) if self.retention is not None else self.budget
        return min(rows or length, length)

    @torch.no_grad()
    def evict(self, cache: PagedAttentionCache, state: RequestState) -> None:
        """Evicts all tokens of a request, and shortens it and its table by the blocks that this frees."""
        allocator = cast(FullAttentionCacheAllocator, cache.cache_allocators[FULL_ATTENTION])
        self.prompts += 1
        length, page = state.position_offset, allocator.tokens_per_page
        keep = self.target(length)
        freed = (length - keep) // page
        if freed == 0:
            return
        table = allocator.block_table[state.request_id]
        # A block: for every layer a page of keys and one of values.
        shape = (-1, allocator.pages_per_block, 2, page, allocator.num_key_value_heads, allocator.head_dim)
        views = layout.view(allocator.cache_tensor.view(shape), "PLSNHC")
        ks, vs = cast(tuple[list[Tensor], list[Tensor]], views)
        ids = torch.tensor([table], device=ks[0].device)
        scores = [self._score(i, k[ids[0]], v[ids[0]], length, keep) for i, (k, v) in enumerate(zip(ks, vs))]  # noqa: B905
        lkv_ext.evict_paged_(
            [ks, vs], scores, keep, ids, [length], sink=self.policy.sink, window=self.policy.window, to="back"
        )
        cache.pool.free_blocks(allocator.index, table[:freed])
        del table[:freed]
        state.position_offset -= freed * page
        state.lkv_dropped = freed * page  # type: ignore[attr-defined]  # goes where the request goes
        self.freed_blocks += freed

    def _score(self, layer: int, k: Tensor, v: Tensor, length: int, keep: int) -> Tensor:
        """`[1, H, L]` of one layer, given the pages `[M, H, page, D]` of a request."""
        keys, values = (t.transpose(0, 1).flatten(1, 2)[None, :, :length] for t in (k, v))
        heads = keys.shape[1]
        count = torch.full((1, heads), length, device=k.device)
        places = torch.arange(length, device=k.device).expand(1, heads, length)
        budget = torch.tensor([keep], device="cpu")
        seen = Observation(keys, values, places, count, torch.zeros_like(count), budget=budget)
        scores = self.policy.score(layer, seen)
        if isinstance(self.policy, Refines):
            scores = self.policy.refine(layer, seen, scores, torch.full_like(count, keep))
        return scores


class EvictingIOs(ContinuousBatchingIOs):
    """The inputs of a forward: tokens have the positions that they have in the whole text."""

    def prepare_batch_tensors(self, requests_in_batch: list[FutureRequestState], *args: Any, **kwargs: Any) -> None:
        super().prepare_batch_tensors(requests_in_batch, *args, **kwargs)
        dropped = [getattr(future.state, "lkv_dropped", 0) for future in requests_in_batch]
        if any(dropped):
            counts = torch.tensor([future.query_length for future in requests_in_batch], device="cpu")
            shift = torch.tensor(dropped, dtype=torch.int32, device="cpu").repeat_interleave(counts)
            self.position_ids[: len(shift)] += shift.to(self.position_ids.device)


class EvictingProcessor(ContinuousBatchProcessor):
    """The loop over forwards: a request whose prompt has been read to its end is evicted before the next one."""

    eviction: Eviction

    def update_batch(self) -> None:
        batch = cast(ContinuousBatchingIOs, self.inputs_and_outputs).requests_in_batch
        ended = [future.state for future in batch if future.has_new_token and future.state.generated_len() == 0]
        super().update_batch()
        with stream_context(self.inputs_and_outputs.compute_stream):
            for state in ended:
                if state.status == RequestStatus.DECODING:
                    self.eviction.evict(self.cache, state)


class EvictingManager(ContinuousBatchingManager):
    """transformers' manager of requests, with all its methods. See `continuous_batching`, which makes it."""

    def __init__(
        self,
        model: PreTrainedModel,
        eviction: Eviction,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: WorkloadHints | None = None,
    ) -> None:
        self.eviction = eviction
        super().__init__(cast(Any, model), generation_config, continuous_batching_config, workload_hints)
        _expect(self.distributed_helper.tp_size == 1, "a model on one device", "tensor parallelism")

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        """transformers makes these objects itself: they become ours, with the same attributes and a method changed."""
        processor: Any = super()._create_batch_processor()
        processor.__class__ = EvictingProcessor
        processor.eviction = self.eviction
        processor.inputs_and_outputs.__class__ = EvictingIOs
        return cast(ContinuousBatchProcessor, processor)


@contextmanager
def continuous_batching(
    model: PreTrainedModel,
    policy: str | Policy = "knorm",
    *,
    retention: float | None = None,
    budget: int | None = None,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: WorkloadHints | None = None,
) -> Iterator[EvictingManager]:
    """A manager of transformers that evicts the prompt of every request once it has been read; runs within the block.

    A prompt may be read in pieces, together with others; it is attended to in full and must fit the pool, and what is
    gained is the memory and the time of the answer. A request that transformers takes out of a full pool is read again
    later: what it has answered so far is then part of its prompt, seen in full and evicted with it.

    Args:
        model: whose layers all attend to the whole text.
        policy: by name or as an object: one that scores by keys and values alone, such as "knorm", "keydiff", "lagkv"
            or that of an LKV checkpoint. Heads keep rows of their own by its scores, and all as many.
        retention: share of the prompt that every head keeps, rounded up to what drops whole blocks.
        budget: rows that every head keeps, in the place of `retention`.
        generation_config: default: the model's. One answer per prompt.
        continuous_batching_config: transformers' own, with `page_size` a power of two and without what holds or
            moves blocks elsewhere: allow_block_sharing=False, use_async_batching=False, cpu_offload_space=0.
        workload_hints: transformers' own, which sizes the batches.

    Raises:
        ImportError: on import, for a version of transformers without the pool and scheduler that this follows.
        ValueError, TypeError: for a model, a policy or an option that eviction cannot follow, by its name.
    """
    eviction = Eviction(policies.get(policy), retention, budget)
    _check_model(model)
    generation_config = generation_config or cast(Any, model).generation_config or GenerationConfig()
    if continuous_batching_config is None:
        continuous_batching_config = ContinuousBatchingConfig(allow_block_sharing=False, use_async_batching=False)
    _check_options(generation_config, continuous_batching_config)
    manager = EvictingManager(model, eviction, generation_config, continuous_batching_config, workload_hints)
    manager.warmup()
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)
        manager.destroy()


def generate_batch(
    model: PreTrainedModel,
    inputs: Sequence[Sequence[int]],
    policy: str | Policy = "knorm",
    *,
    retention: float | None = None,
    budget: int | None = None,
    max_new_tokens: int | None = None,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
) -> list[GenerationOutput]:
    """`model.generate_batch` with eviction: answers to prompts of token ids, in their order. Arguments as above.

    Raises:
        RuntimeError: where a request failed, with the reason.
    """
    answers: dict[str, GenerationOutput] = {}
    longest = max_new_tokens or (generation_config or cast(Any, model).generation_config).max_new_tokens or 0
    hints = WorkloadHints(max(map(len, inputs), default=0), longest, len(inputs))
    with continuous_batching(
        model,
        policy,
        retention=retention,
        budget=budget,
        generation_config=generation_config,
        continuous_batching_config=continuous_batching_config,
        workload_hints=hints,
    ) as manager:
        ids = manager.add_requests([list(prompt) for prompt in inputs], max_new_tokens=max_new_tokens)
        while len(answers) < len(ids):
            answer = manager.get_result(timeout=1)
            if answer is not None and answer.is_finished():
                answers[answer.request_id] = answer
            elif answer is None and not manager.is_running():
                break
    failed = [f"{i}: {answers[i].error}" for i in ids if i in answers and answers[i].error is not None]
    failed += [f"{i}: the manager stopped" for i in ids if i not in answers]
    if failed:
        raise RuntimeError(f"lkv.hf.batching: {len(failed)} of {len(ids)} requests failed, {failed[0]}")
    return [answers[i] for i in ids]


def _expect(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"lkv.hf.batching: expected {expected}, got {got}")


def _check_model(model: PreTrainedModel) -> None:
    groups = group_layers_by_attn_type(model.config.get_text_config())
    others = set(groups) - {FULL_ATTENTION}
    _expect(not others, "a model whose layers all attend to the whole text", ", ".join(others))
    owners = find_decoder(model).readers
    _expect(len(owners) == len(groups[FULL_ATTENTION]), "layers that all hold keys of their own", type(model).__name__)


def _check_options(generation: GenerationConfig, config: ContinuousBatchingConfig) -> None:
    forks = generation.num_return_sequences or 1
    _expect(forks == 1, "num_return_sequences=1, as forks share blocks", f"num_return_sequences={forks}")
    needed = {
        "allow_block_sharing": (False, "evicted blocks hold no prefix that others could share"),
        "use_async_batching": (False, "the next batch is prepared before a prompt is evicted"),
        "cpu_offload_space": (0, "blocks in the host's memory are not followed"),
    }
    for name, (value, reason) in needed.items():
        given = getattr(config, name)
        _expect(given == value and given is not None, f"{name}={value}, as {reason}", f"{name}={given}")
    page = config.page_size
    _expect(page > 0 and page & (page - 1) == 0, "page_size as a power of two", f"page_size={page}")
