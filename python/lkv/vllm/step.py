"""What is done in a step beside its attention: prompts that end in it, and where rows go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lkv.vllm.pages import Pages


@dataclass
class Ended:
    """A prompt that ends in this step: its rows are moved once the step's attention has read them.

    Attributes:
        prompt: its tokens.
        computed: those of earlier steps, whose rows are in the pool alone.
        start: where the others begin among the tokens of the step.
        drops: rows that go, one number per table.
        tables: int64 `[tables, blocks of the prompt]`, on the device.
    """

    prompt: int
    computed: int
    start: int
    drops: list[int]
    tables: Tensor


@dataclass
class Step:
    """
    Attributes:
        ended: prompts whose rows are moved.
        pages: the same for eviction in the pool's own pages; None where a backend does not evict so, or nothing ends.
        replayed: of requests that were preempted, outputs that are computed again in the step in which the prompt ends:
            the tokens, and the metadata of their attention to what is left of the prompt.
        slots: int64 `[tokens * H]`, where every head has blocks of its own: where the rows of the tokens go.
        order: int64, where the batch is not one token per sequence: tokens by (sequence, head); see `metadata.by_head`.
    """

    ended: list[Ended] = field(default_factory=list)
    pages: Pages | None = None
    replayed: tuple[Tensor, Any] | None = None
    slots: Tensor | None = None
    order: Tensor | None = None
