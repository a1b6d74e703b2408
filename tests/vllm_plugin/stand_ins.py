"""Stand-ins for vLLM's attention kernels for GPUs: the same signatures, computed in PyTorch on the CPU.

They read the pools by the very tables, lengths and page indices that they are given, and check what the kernels ask of
them; a block of zeros is the null block, which no sequence reads.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

NULL = 0
CALLS: list[str] = []  # kernels that have run


def attend_paged(
    query: Tensor, keys: Tensor, values: Tensor, blocks: list[Tensor], used: list[int], counts: list[int], scale: float
) -> Tensor:
    """Causal attention of sequences, one after the other, to what is in their blocks.

    Args:
        query: `[T, Hq, D]`. keys, values: `[P, page, H, D]`. blocks: of each sequence.
        used: rows of each that are in the pool. counts: query tokens of each, its last ones.

    Returns:
        `[T, Hq, D]`.
    """
    out, page, group = [], keys.shape[1], query.shape[1] // keys.shape[2]
    assert sum(counts) == len(query) and len(counts) == len(used) == len(blocks)
    for part, own, length in zip(query.split(counts), blocks, used, strict=True):
        own = own[: -(-length // page)].long()
        assert len(own) == -(-length // page) and length >= len(part)
        assert (own != NULL).all() and (own < len(keys)).all() and len(own.unique()) == len(own)
        k, v = (x[own].flatten(0, 1)[:length].repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        weights = part.transpose(0, 1) @ k.transpose(1, 2) * scale  # [Hq, count, length]
        hidden = torch.ones(weights.shape[1:], dtype=torch.bool).triu(length - len(part) + 1)
        out.append((weights.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def write_rows(
    key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor, dtype: str, k_scale: Any, v_scale: Any
) -> None:
    """reshape_and_cache_flash. key, value: `[T', H, D]`, T' >= T. k, v: `[P, page, H, D]`. slots: int64 `[T]`."""
    assert dtype == "auto" and slots.dtype == torch.int64 and len(key) >= len(slots)
    assert key.shape[1:] == k.shape[2:] and k.shape == v.shape
    written = slots >= 0
    at = slots[written]
    for pool, rows in ((k, key), (v, value)):
        pool[at // k.shape[1], at % k.shape[1]] = rows[: len(slots)][written]


class FlashAttention:
    """vllm_flash_attn of version 3."""

    def schedule(self, **given: Any) -> Tensor:
        """get_scheduler_metadata: what the kernel compares with what it gets."""
        shape = [given["batch_size"], given["num_heads_q"], given["num_heads_kv"], given["max_seqlen_q"]]
        assert given["cache_seqlens"].dtype == torch.int32 and given["cache_seqlens"].max() <= given["max_seqlen_k"]
        return torch.cat([torch.tensor(shape, dtype=torch.int32), given["cache_seqlens"]])

    def attend(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        seqused_k: Tensor,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        window_size: list[int],
        block_table: Tensor,
        softcap: float,
        scheduler_metadata: Tensor,
        fa_version: int,
        k_descale: Tensor,
        v_descale: Tensor,
        num_splits: int,
        **others: Any,
    ) -> None:
        """flash_attn_varlen_func."""
        CALLS.append("flash_attn")
        counts = cu_seqlens_q.diff()
        batch, heads, dim = len(counts), k.shape[2], q.shape[2]
        assert (causal, window_size, softcap, fa_version, num_splits) == (True, [-1, -1], 0, 3, 0)
        assert all(t.dtype == torch.int32 for t in (cu_seqlens_q, seqused_k, block_table))
        assert seqused_k.shape == (batch,) and block_table.shape[0] == batch and block_table.stride(1) == 1
        assert k_descale.shape == v_descale.shape == (batch, heads) and k.shape[3] == v.shape[3] == dim
        assert k.stride(3) == 1 and counts.max() <= max_seqlen_q and seqused_k.max() <= max_seqlen_k
        expected = self.schedule(
            batch_size=batch, num_heads_q=q.shape[1], num_heads_kv=heads, max_seqlen_q=max_seqlen_q,
            cache_seqlens=seqused_k, max_seqlen_k=max_seqlen_k,
        )  # fmt: skip
        assert torch.equal(scheduler_metadata, expected)
        assert not any(others[name] is not None for name in ("alibi_slopes", "s_aux", "mask_mod", "dynamic_causal"))
        found = attend_paged(q, k, v, list(block_table), seqused_k.tolist(), counts.tolist(), softmax_scale)
        out.copy_(found)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        from vllm.v1.attention.backends import flash_attn

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: 3)
            patch.setattr(flash_attn, "flash_attn_varlen_func", self.attend, raising=False)
            patch.setattr(flash_attn, "get_scheduler_metadata", self.schedule, raising=False)
            patch.setattr(flash_attn, "reshape_and_cache_flash", write_rows, raising=False)
            yield


def paged(cache: tuple[Tensor, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """Keys and values `[P, page, H, D]` of a cache in the order `kind`, NHD or HND."""
    k, v = cache
    return (k, v) if kind == "NHD" else (k.transpose(1, 2), v.transpose(1, 2))


class Wrapper:
    """A planned attention of FlashInfer: it keeps what it was planned with, page indices by reference."""

    def __init__(self, workspace: Tensor, kind: str, use_cuda_graph: bool = False, **options: Any) -> None:
        assert workspace.dtype == torch.uint8 and not use_cuda_graph
        self.kind, self.is_cuda_graph_enabled = kind, False

    def keep(self, given: dict[str, Any], counts: Tensor, heads: int) -> None:
        self.indptr, self.indices, self.counts = given["paged_kv_indptr"].clone(), given["paged_kv_indices"], counts
        self.last, self.page = given["paged_kv_last_page_len"].clone(), given["page_size"]
        self.heads = given["num_qo_heads"], given["num_kv_heads"], heads
        self._window_left, self._sm_scale = given["window_left"], given["sm_scale"]
        self._logits_soft_cap = given["logits_soft_cap"] or 0.0
        lengths = get_seq_lens(self.indptr, self.last, self.page)
        assert torch.equal(given["seq_lens"], lengths) and len(counts) == len(lengths)

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor], *, out: Tensor, **options: Any) -> None:
        CALLS.append(type(self).__name__)
        keys, values = paged(cache, self.kind)
        assert (query.shape[1], keys.shape[2], keys.shape[3]) == self.heads and keys.shape[1] == self.page
        blocks = [self.indices[a:b] for a, b in zip(self.indptr[:-1], self.indptr[1:], strict=True)]
        used = get_seq_lens(self.indptr, self.last, self.page).tolist()
        out.copy_(attend_paged(query, keys, values, blocks, used, self.counts.tolist(), self._sm_scale))


class Prefill(Wrapper):
    def plan(self, *, qo_indptr: Tensor, head_dim_qk: int, causal: bool, **given: Any) -> None:
        self._causal = causal
        assert causal
        self.keep(given, qo_indptr.diff(), head_dim_qk)


class Decode(Wrapper):
    def plan(self, *, indptr: Tensor, indices: Tensor, last_page_len: Tensor, head_dim: int, **given: Any) -> None:
        pages = dict(paged_kv_indptr=indptr, paged_kv_indices=indices, paged_kv_last_page_len=last_page_len)
        self.keep({**given, **pages}, torch.ones_like(last_page_len), head_dim)


def get_seq_lens(indptr: Tensor, last_page_len: Tensor, page: int) -> Tensor:
    return (indptr.diff() - 1).clamp(min=0) * page + last_page_len


class CopyPages:
    """The Triton kernel that copies page indices out of a block table, `[grid](...)`."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(indices: Tensor, table: Tensor, stride: int, indptr: Tensor, BLOCK_SIZE: int) -> None:
            assert len(table) >= grid[0] and stride == table.stride(0) and table.dtype == torch.int32
            for row, a, b in zip(range(grid[0]), indptr[:-1].tolist(), indptr[1:].tolist(), strict=False):
                indices[a:b] = table[row, : b - a]

        return launch


def by_tables(name: str, counts: Any) -> Any:
    """A kernel of TensorRT-LLM or XQA, which reads tables and lengths of the device. counts: of its arguments."""

    def attend(
        *, query: Tensor, kv_cache: Any, block_tables: Tensor, seq_lens: Tensor, out: Tensor, **given: Any
    ) -> None:
        CALLS.append(name)
        longest = given.get("max_seq_len", given.get("max_kv_len"))
        assert block_tables.is_contiguous() and block_tables.dtype == seq_lens.dtype == torch.int32
        assert seq_lens.max() <= longest and given["window_left"] == -1 and given["sinks"] is None
        keys, values = paged(kv_cache, given.get("kv_layout", "HND"))
        each = counts(len(query), len(seq_lens), given)
        scale = given["bmm1_scale"]
        assert given["bmm2_scale"] == 1 and len(block_tables) == len(seq_lens)
        out.copy_(attend_paged(query, keys, values, list(block_tables), seq_lens.tolist(), each, scale))

    return attend


def _decoded(tokens: int, sequences: int, given: dict[str, Any]) -> list[int]:
    assert given["q_len_per_req"] == 1 and tokens == sequences
    return [1] * sequences


class FlashInfer:
    """FlashInfer with one of its ways to decode: "native", its own kernels, "xqa" (sm_90) or "trtllm" (sm_100)."""

    def __init__(self, decode: str) -> None:
        self.decode = decode

    def modules(self) -> dict[str, ModuleType]:
        unused = type("Unused", (), {})
        context = by_tables("trtllm context", lambda tokens, sequences, given: given["cum_seq_lens_q"].diff().tolist())
        names: dict[str, dict[str, Any]] = {
            "flashinfer": {
                "BatchAttentionWithAttentionSinkWrapper": unused,
                "BatchDecodeWithPagedKVCacheWrapper": Decode,
                "BatchPrefillWithPagedKVCacheWrapper": Prefill,
                "BatchPrefillWithRaggedKVCacheWrapper": unused,
                "get_seq_lens": get_seq_lens,
                "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": None,
            },
            "flashinfer.decode": {
                "fast_decode_plan": None,
                "trtllm_batch_decode_with_kv_cache": by_tables("trtllm decode", _decoded),
            },
            "flashinfer.prefill": {"trtllm_batch_context_with_kv_cache": context},
            "flashinfer.utils": {"FP4Tensor": unused},
        }
        found = {}
        for name, members in names.items():
            found[name] = ModuleType(name)
            vars(found[name]).update(members)
        return found

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        importlib.import_module("vllm.utils.flashinfer")  # looks for the package, before there is this one
        with pytest.MonkeyPatch.context() as patch:
            for name, module in self.modules().items():
                patch.setitem(sys.modules, name, module)
            patch.setenv("VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE", "1024")
            from vllm.v1.attention.backends import flashinfer

            kernel = {"xqa": "XQA", "trtllm": "TRTLLM_GEN"}.get(self.decode)
            builder = flashinfer.FlashInferMetadataBuilder
            patch.setattr(flashinfer, "_copy_page_indices_kernel", CopyPages())
            patch.setattr(flashinfer, "pin_host_range_buf", lambda length: None)
            patch.setattr(flashinfer, "PIN_MEMORY", False)
            workspace = torch.zeros(1024, dtype=torch.uint8)
            patch.setattr(flashinfer, "_get_trtllm_workspace_buffer", lambda: workspace)
            patch.setattr(flashinfer, "can_use_trtllm_attention", lambda *args, **kwargs: kernel is not None)
            patch.setattr(flashinfer, "use_trtllm_attention", lambda *args, **kwargs: kernel == "TRTLLM_GEN")
            patch.setattr(flashinfer, "flashinfer_xqa_batch_decode_with_kv_cache", by_tables("xqa decode", _decoded))
            if kernel is not None:
                found = getattr(flashinfer.FlashInferDecodeKernel, kernel)
                patch.setattr(builder, "_get_flashinfer_trtllm_api_decode_kernel", staticmethod(lambda: found))
            caches = SimpleNamespace(reshape_and_cache_flash=write_rows)
            patch.setattr(torch.ops, "_C_cache_ops", caches, raising=False)
            yield
