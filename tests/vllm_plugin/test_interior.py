"""Rows that vLLM's op writes into its blocks are read as they were, for every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from vllm import _custom_ops as ops  # noqa: E402

from lkv.vllm.cpu import Interior  # noqa: E402

HEADS, BLOCKS = 3, 4


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_come_back(isa: str, page: int, dim: int, dtype: torch.dtype) -> None:
    if isa == "amx" and not (torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16):
        pytest.skip("AMX is for bfloat16, where there is AMX")
    if isa != "vec16" and page % 32:
        pytest.skip("vLLM takes it for blocks of a multiple of 32 tokens")
    torch.manual_seed(0)
    tokens = BLOCKS * page - 5
    keys, values = torch.randn(2, tokens, HEADS, dim).to(dtype).unbind(0)
    cache = torch.zeros(2 * BLOCKS, HEADS, page, 2 * dim, dtype=dtype)
    table = torch.randperm(2 * BLOCKS)[:BLOCKS]
    slots = table.repeat_interleave(page)[:tokens] * page + torch.arange(tokens) % page
    k, v = cache.view(2 * BLOCKS, HEADS, 2 * page, dim).chunk(2, 2)
    ops.cpu_attn_reshape_and_cache(keys, values, k, v, slots, isa)
    found = Interior(isa, dtype, page, dim).read(cache, table[None], HEADS)
    for got, expected in zip(found, (keys, values), strict=True):
        assert torch.equal(got[:, :tokens].transpose(0, 1), expected)
