"""Eviction inside the pages of an engine's pool: kept rows move behind those that go, in one launch per layer.

For pools whose rows lie by strides, as those of vLLM's kernels for GPUs do. Checked with stand-ins for these kernels,
not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lkv_ext
from lkv_ext import layout

Scores = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Pages:
    """The prompts that end in a step, as `evict_paged_` takes them: the same in all layers of a group.

    Attributes:
        prompts: tokens of each, B of them.
        tables: int64 `[B, M]`, or `[B, H, M]` where every head has blocks of its own; on the device, as what follows.
        lengths: int32 `[B]`: tokens of each.
        budgets: int32 `[B, H]`: rows that stay, whole blocks less than those of the prompt.
        most: the largest budget.
    """

    prompts: list[int]
    tables: Tensor
    lengths: Tensor
    budgets: Tensor
    most: int

    @classmethod
    def of(cls, ended: Sequence[Any], heads: int) -> Pages:
        """
        Args:
            ended: prompts, each a `step.Ended`.
            heads: KV heads that the blocks of a layer hold.
        """
        first = ended[0].tables
        prompts = [one.prompt for one in ended]
        tables = first.new_zeros(len(ended), len(first), max(one.tables.shape[1] for one in ended))
        for row, one in zip(tables, ended, strict=True):
            row[:, : one.tables.shape[1]] = one.tables
        kept = np.array([[one.prompt - drop for drop in one.drops] for one in ended], dtype=np.int32)
        budgets = np.repeat(kept, heads // kept.shape[1], axis=1)
        return cls(
            prompts,
            tables if len(first) > 1 else tables[:, 0],
            on_device(np.array(prompts, dtype=np.int32), first.device),
            on_device(budgets, first.device),
            int(kept.max()),
        )

    def evict(self, cache: Tensor, scores: Scores, sink: int, window: int) -> None:
        """Moves the kept rows of one layer.

        Nothing waits for the device. The memory is that of the keys and values of one prompt, and of scores.

        Args:
            cache: the pool of the layer in any order of its axes in memory: `[P, H, page, 2 * D]`, keys beside values;
                with H = 1 where a page is of one head. Written in the blocks behind those that go.
            scores: of a prompt, float32 `[1, H, T]`, from its keys and values `[H, T, D]`.
            sink, window: first and last tokens that every head keeps.
        """
        k, v = layout.vllm(cache, "packed")
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        if self.tables.dim() == 3:
            k, v = k[:, 0], v[:, 0]
        ranking = self._scores(k, v, scores)
        lkv_ext.evict_paged_(
            [k, v], ranking, self.budgets, self.tables, self.lengths,
            sink=sink, window=window, max_budget=self.most, to="back",
        )  # fmt: skip

    def _scores(self, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """float32 `[B, H, T]` of the longest prompt; what is behind the others is not read."""
        longest = max(self.prompts)
        ranking = k.new_empty(*self.budgets.shape, longest, dtype=torch.float32)
        for row, table, tokens in zip(ranking, self.tables, self.prompts, strict=True):
            row[:, :tokens] = scores(rows(k, table, tokens), rows(v, table, tokens))[0]
        return ranking


def rows(pool: Tensor, table: Tensor, tokens: int) -> Tensor:
    """A copy `[H, tokens, D]` of a sequence's rows.

    Args:
        pool: `[P, H, page, D]` with table `[M]`, or `[P, page, D]` with table `[H, M]`.
    """
    table = table[..., : -(-tokens // pool.shape[-2])]
    pages = pool[table] if table.dim() == 2 else pool.transpose(0, 1)[:, table]  # [H, M, page, D]
    return pages.flatten(1, 2)[:, :tokens]


def on_device(values: Any, device: torch.device) -> Tensor:
    """Numbers of the host on a device, without waiting for it."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
