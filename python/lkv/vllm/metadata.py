"""The worker's side of a step: the tables and lengths that attention sees, and the prompts that end in it.

A sequence whose prompt of P tokens has ended has its kept rows in `[drop, P)`, in whole blocks: its table without the
first `drop / block` entries and its length without `drop` tokens describe all that there is to attend to, while slots
and positions of new tokens stay vLLM's. This is a function of P, the retention and the layer's shares alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lkv.vllm import requests
from lkv.vllm.settings import OFF
from lkv.vllm.spec import EvictedSpec


@dataclass
class Ended:
    """A prompt that ends in this step: its rows are moved once the step's attention has read them.

    Attributes:
        prompt: its tokens.
        computed: those of earlier steps, whose rows are in the pool alone.
        start: where the others begin among the tokens of the step.
        drops: rows that go, one number per table.
        tables: int64 `[tables, blocks of the prompt]`.
    """

    prompt: int
    computed: int
    start: int
    drops: list[int]
    tables: Tensor


@dataclass
class Step:
    """What is done in a step beside its attention.

    Attributes:
        ended: prompts whose rows are moved.
        replayed: of requests that were preempted, outputs that are computed again in the step in which the prompt ends:
            the tokens, and the metadata of their attention to what is left of the prompt.
        slots: int64 `[tokens * H]`, where every head has blocks of its own: where the rows of the tokens go.
        order: int64, where the batch is not one token per sequence: tokens by (sequence, head); see `by_head`.
    """

    ended: list[Ended] = field(default_factory=list)
    replayed: tuple[Tensor, Any] | None = None
    slots: Tensor | None = None
    order: Tensor | None = None


class Evicting:
    """Makes a metadata builder of vLLM describe evicted sequences; before the builder in the order of bases."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any, **kwargs: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)  # type: ignore[call-arg]
        self.evicts = isinstance(kv_cache_spec, EvictedSpec)
        if not self.evicts:
            return
        batch = requests.of(vllm_config)
        if batch is None:
            raise ValueError(
                f"lkv.vllm: expected {requests.NAME} among logits_processors: pass --logits-processors {requests.NAME}"
            )
        batch.builders += 1
        self.batch, self.spec, self.page = batch, kv_cache_spec, int(kv_cache_spec.block_size)
        self.heads = self.spec.tables

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        if not self.evicts:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        common, rows = common_attn_metadata, common_attn_metadata.num_reqs
        prompts = self.batch.prompts[:rows]
        starts = common.query_start_loc_cpu.numpy()
        lengths = common.seq_lens_cpu_upper_bound[:rows].numpy()
        computed = lengths - np.diff(starts[: rows + 1])
        drops = self._drops(prompts)
        gone = np.where((computed >= prompts)[:, None], drops, 0)
        ending = np.flatnonzero((computed < prompts) & (lengths >= prompts) & drops.any(1)).tolist()

        step = Step(ended=[self._ended(common, row, int(computed[row]), drops[row]) for row in ending])
        metadata = self._evicted(common, gone, step)
        outputs = [row for row in ending if lengths[row] > prompts[row]]
        if outputs:
            step.replayed = self._replayed(common, outputs, drops)
        metadata.step = step
        return metadata

    def _drops(self, prompts: Any) -> Any:
        """int64 `[R, tables]`."""
        drops = np.zeros((len(prompts), self.heads), dtype=np.int64)
        for row in np.flatnonzero(self.batch.retentions[: len(prompts)] < OFF):
            drops[row] = self.spec.drops(int(prompts[row]), float(self.batch.retentions[row]))
        return drops

    def _ended(self, common: Any, row: int, computed: int, drops: Any) -> Ended:
        prompt = int(self.batch.prompts[row])
        blocks = -(-prompt // self.page)
        table = common.block_table_tensor[row, : blocks * self.heads]
        start = int(common.query_start_loc_cpu[row])
        tables = table.view(blocks, self.heads).t().long()
        return Ended(prompt, computed, start, [int(drop) for drop in drops], tables)

    def _evicted(self, common: Any, gone: Any, step: Step) -> Any:
        """The builder's own metadata, of sequences without the rows that have gone: `gone` int64 `[R, tables]`."""
        if self.heads > 1:
            common = self._heads_apart(common, step)
        if gone.any():
            table, shift = common.block_table_tensor, torch.from_numpy(gone.ravel()).to(common.seq_lens.device)
            at = torch.arange(table.shape[1], device=table.device) + (shift // self.page)[:, None]
            lengths = common.seq_lens - shift.to(common.seq_lens.dtype)
            common = common.replace(
                block_table_tensor=table.gather(1, at.clamp_(max=table.shape[1] - 1)),
                seq_lens=lengths,
                seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound - torch.from_numpy(gone.ravel()),
                max_seq_len=int((common.seq_lens_cpu_upper_bound - torch.from_numpy(gone.ravel())).max()),
            )
        return super().build(0, common)  # type: ignore[misc]

    def _replayed(self, common: Any, rows: list[int], drops: Any) -> tuple[Tensor, Any]:
        starts, lengths = common.query_start_loc_cpu.numpy(), common.seq_lens_cpu_upper_bound.numpy()
        counts = np.array([lengths[row] - self.batch.prompts[row] for row in rows])
        ends = starts[np.array(rows) + 1]
        tokens = torch.from_numpy(
            np.concatenate([np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)])
        )
        loc = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32))
        at = torch.tensor(rows)
        device = common.seq_lens.device
        part = common.replace(
            query_start_loc=loc.to(device),
            query_start_loc_cpu=loc,
            seq_lens=common.seq_lens[at.to(device)],
            seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[at],
            num_reqs=len(rows),
            num_actual_tokens=len(tokens),
            max_query_len=int(counts.max()),
            block_table_tensor=common.block_table_tensor[at.to(device)],
            slot_mapping=common.slot_mapping[tokens.to(device)],
            positions=common.positions[tokens.to(device)],
        )
        tokens, step = tokens.to(device), Step()
        metadata = self._evicted(part, drops[np.array(rows)], step)
        metadata.step = step
        return tokens, metadata

    def _heads_apart(self, common: Any, step: Step) -> Any:
        """Every head of a sequence a sequence of its own, with its group of query heads: `[R * H]` of them."""
        heads, rows, tokens = self.heads, common.num_reqs, common.num_actual_tokens
        table = common.block_table_tensor.view(rows, -1, heads)
        starts = common.query_start_loc_cpu[: rows + 1].long()
        counts = starts.diff()
        position = common.positions[:tokens]
        sequence = torch.repeat_interleave(torch.arange(rows), counts, output_size=int(starts[-1])).to(position.device)
        if len(sequence) < tokens:  # padding, which goes into the null block
            sequence = torch.nn.functional.pad(sequence, (0, tokens - len(sequence)))
        blocks = table[sequence, position // self.page]  # [tokens, H]
        slots = blocks * self.page + (position % self.page)[:, None]
        slots = torch.where((common.slot_mapping[:tokens] < 0)[:, None], -1, slots)
        step.slots = slots.reshape(-1).long()
        if common.max_query_len > 1:
            step.order = by_head(counts, heads).to(position.device)
        loc = torch.cat([starts.new_zeros(1), counts.repeat_interleave(heads).cumsum(0)]).int()
        return common.replace(
            query_start_loc=loc.to(common.query_start_loc.device),
            query_start_loc_cpu=loc,
            seq_lens=common.seq_lens.repeat_interleave(heads),
            seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound.repeat_interleave(heads),
            num_reqs=rows * heads,
            num_actual_tokens=tokens * heads,
            block_table_tensor=table.transpose(1, 2).reshape(rows * heads, -1).contiguous(),  # a view of one sequence
            slot_mapping=step.slots,
            is_prefilling=None,
        )


def by_head(counts: Tensor, heads: int) -> Tensor:
    """Order in which rows `[tokens * heads]`, token by token, lie sequence by sequence and within it head by head.

    Args:
        counts: int64 `[R]`: tokens of each sequence.
        heads: heads that have a sequence each.

    Returns:
        int64 `[tokens * heads]`: the row that comes at each place.
    """
    starts = (counts.cumsum(0) - counts).repeat_interleave(heads)
    each = counts.repeat_interleave(heads)  # of (sequence, head)
    first = each.cumsum(0) - each
    head = torch.arange(heads).repeat(len(counts))
    place = torch.arange(int(each.sum())) - first.repeat_interleave(each)
    return (starts.repeat_interleave(each) + place) * heads + head.repeat_interleave(each)
