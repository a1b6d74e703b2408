"""The worker's side of a step: the tables and lengths that attention sees, and the prompts that end in it.

A sequence whose prompt of P tokens has ended has its kept rows in `[drop, P)`, in whole blocks: its table without the
first `drop / block` entries and its length without `drop` tokens describe all that there is to attend to, while slots
and positions of new tokens stay vLLM's. This is a function of P, the retention and the layer's shares alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import iter_layer_specs

from lkv.vllm import requests
from lkv.vllm.pages import Pages, on_device
from lkv.vllm.settings import OFF, dropped_rows
from lkv.vllm.spec import EvictedSpec
from lkv.vllm.step import Ended, Step


class Evicting(ABC):
    """Makes a metadata builder of vLLM describe evicted sequences; before the builder in the order of bases.

    Nothing here waits for the device: what is decided is decided from numbers of the host.

    Attributes:
        in_place: whether rows move in the pages of the pool, by `Pages`.
        supports_update_block_table: vLLM would give the tables of one group of layers to the metadata of another, past
            `build`.
    """

    in_place = False
    supports_update_block_table = False

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
        if self.heads > 1:
            self._one_head()

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """A graph of a whole step would leave out that rows move, also where a chunk of one token ends a prompt."""
        if any(isinstance(spec, EvictedSpec) for spec in iter_layer_specs(kv_cache_spec)):
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]

    @abstractmethod
    def _one_head(self) -> None:
        """The builder's own numbers of heads become those of one KV head and its group of query heads."""

    def _other_builder(self) -> Any:
        """A builder that makes metadata of a second batch while that of the first one is in use."""
        return self

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
        if self.in_place and step.ended:
            step.pages = Pages.of(step.ended, self.spec.num_kv_heads)
        metadata = self._evicted(self, common, gone, step)
        outputs = [row for row in ending if lengths[row] > prompts[row]]
        if outputs:
            step.replayed = self._replayed(common, outputs, drops)
        metadata.step = step
        return metadata

    def _drops(self, prompts: Any) -> Any:
        """int64 `[R, tables]`: as `spec.drops` says of each request."""
        retentions = self.batch.retentions[: len(prompts), None]
        drops = dropped_rows(prompts[:, None], np.array(self.spec.shares) * retentions, self.page)
        return np.where(retentions < OFF, drops, 0)

    def _ended(self, common: Any, row: int, computed: int, drops: Any) -> Ended:
        prompt = int(self.batch.prompts[row])
        blocks = -(-prompt // self.page)
        table = common.block_table_tensor[row, : blocks * self.heads]
        start = int(common.query_start_loc_cpu[row])
        tables = table.view(blocks, self.heads).t().long()
        return Ended(prompt, computed, start, [int(drop) for drop in drops], tables)

    def _evicted(self, builder: Any, common: Any, gone: Any, step: Step) -> Any:
        """The metadata of vLLM's builder, of sequences without the rows that have gone: `gone` int64 `[R, tables]`."""
        if self.heads > 1:
            common = self._heads_apart(common, step)
        if gone.any():
            rows, device = common.num_reqs, common.seq_lens.device
            bound = common.seq_lens_cpu_upper_bound[:rows]
            bound = bound - torch.from_numpy(gone.ravel()).to(bound.dtype)
            table, shift = common.block_table_tensor[:rows], on_device(gone.ravel(), device)
            at = torch.arange(table.shape[1], device=device) + (shift // self.page)[:, None]
            common = common.replace(
                block_table_tensor=table.gather(1, at.clamp_(max=table.shape[1] - 1)),
                seq_lens=common.seq_lens[:rows] - shift.to(common.seq_lens.dtype),
                seq_lens_cpu_upper_bound=bound,
                max_seq_len=int(bound.max()),
            )
        vllms: Any = super(Evicting, builder)
        return vllms.build(0, common)

    def _replayed(self, common: Any, rows: list[int], drops: Any) -> tuple[Tensor, Any]:
        starts, lengths = common.query_start_loc_cpu.numpy(), common.seq_lens_cpu_upper_bound.numpy()
        counts = np.array([lengths[row] - self.batch.prompts[row] for row in rows])
        ends = starts[np.array(rows) + 1]
        device = common.seq_lens.device
        places = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)])
        loc = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32))
        tokens, at = on_device(places, device), on_device(np.array(rows), device)
        part = common.replace(
            query_start_loc=on_device(loc, device),
            query_start_loc_cpu=loc,
            seq_lens=common.seq_lens[at],
            seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[torch.tensor(rows, device="cpu")],
            num_reqs=len(rows),
            num_actual_tokens=len(places),
            max_query_len=int(counts.max()),
            block_table_tensor=common.block_table_tensor[at],
            slot_mapping=common.slot_mapping[tokens],
            positions=common.positions[tokens],
            is_prefilling=None,
        )
        step = Step()
        metadata = self._evicted(self._other_builder(), part, drops[np.array(rows)], step)
        metadata.step = step
        return tokens, metadata

    def _heads_apart(self, common: Any, step: Step) -> Any:
        """Every head of a sequence a sequence of its own, with its group of query heads: `[R * H]` of them."""
        heads, rows, tokens = self.heads, common.num_reqs, common.num_actual_tokens
        table = common.block_table_tensor[:rows]  # as wide as vLLM rounds it
        table = table[:, : table.shape[1] // heads * heads].reshape(rows, -1, heads)
        starts = common.query_start_loc_cpu[: rows + 1].long()
        counts = starts.diff()
        position = common.positions[:tokens]
        sequence = torch.repeat_interleave(torch.arange(rows, device="cpu"), counts, output_size=int(starts[-1]))
        if len(sequence) < tokens:  # padding, which goes into the null block
            sequence = torch.nn.functional.pad(sequence, (0, tokens - len(sequence)))
        blocks = table[on_device(sequence, position.device), position // self.page]  # [tokens, H]
        slots = blocks * self.page + (position % self.page)[:, None]
        slots = torch.where((common.slot_mapping[:tokens] < 0)[:, None], -1, slots)
        step.slots = slots.reshape(-1).long()
        if common.max_query_len > 1:
            step.order = on_device(by_head(counts, heads), position.device)
        loc = torch.cat([starts.new_zeros(1), counts.repeat_interleave(heads).cumsum(0)]).int()
        return common.replace(
            query_start_loc=on_device(loc, common.query_start_loc.device),
            query_start_loc_cpu=loc,
            seq_lens=common.seq_lens[:rows].repeat_interleave(heads),
            seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[:rows].repeat_interleave(heads),
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
    head = torch.arange(heads, device="cpu").repeat(len(counts))
    place = torch.arange(int(each.sum()), device="cpu") - first.repeat_interleave(each)
    return (starts.repeat_interleave(each) + place) * heads + head.repeat_interleave(each)
