"""Large inputs: many tokens, many ties, many segments, and totals that no int32 of bytes or elements holds."""

from __future__ import annotations

import pytest
import torch
from cases import check, check_index, expected, rows_of, scores_of
from test_layouts import untouched

import lkv_ext


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "minus_infinity", "one_bin", "nan"])
def test_a_million_tokens(device: str, kind: str) -> None:
    """Also: far more equal scores at the pivot than any list of 4096 or counter of 16 bits could hold."""
    scores = scores_of(kind, [1, 1, 2**20]).to(device)
    for budget in (5000, 2**19 + 1, 2**20 - 1):
        index = lkv_ext.select(scores, budget, sink=4, window=64)
        check_index(index, expected([], scores, budget, sink=4, window=64))


def test_ties_take_the_lower_positions(device: str) -> None:
    scores = torch.zeros(1, 1, 200_000, device=device)
    scores[..., 150_000:] = 1
    index = lkv_ext.select(scores, 50_000 + 70_000)
    want = torch.cat([torch.arange(70_000), torch.arange(150_000, 200_000)]).int()
    assert torch.equal(index.positions.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_segments(device: str, dtype: torch.dtype) -> None:
    """More sequences x heads than a grid has blocks in its y axis."""
    batch, heads, tokens = 8750, 8, 12
    k = rows_of([batch, heads, tokens, 4], torch.int16).to(device)
    scores = scores_of("ties", [batch, heads, tokens]).to(dtype).to(device)
    budgets = torch.arange(batch * heads).view(batch, heads) % 15
    out = lkv_ext.evict(k, None, scores, budgets)
    # The reference loops in Python: here, ranks by two stable sorts over all rows at once.
    order = scores.float().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    keep = order < budgets.to(device)[..., None]
    assert torch.equal(out.lengths, keep.sum(-1).int())
    assert torch.equal(out.positions, keep.nonzero()[:, 2].int())
    assert torch.equal(out.k, k[keep])


def test_rows_of_a_megabyte(device: str) -> None:
    k = rows_of([1, 2, 9, 2**20], torch.int8).to(device)
    scores = scores_of("normal", [1, 2, 9]).to(device)
    check(lkv_ext.evict(k, k[..., 1:], scores, [3, 7]), expected([k, k[..., 1:]], scores, [3, 7]))


def test_an_output_past_two_gigabytes() -> None:
    """Rows whose places in the output lie past 2**31 bytes; into memory of which few pages are looked at."""
    heads, tokens, dim = 3, 24, 2**26 - 64
    k = untouched(tokens * dim).view(torch.int8).view(1, 1, tokens, dim).expand(1, heads, tokens, dim)
    k[0, 0, :, :8] = torch.arange(tokens, dtype=torch.int8)[:, None]
    k[0, 0, :, -8:] = -torch.arange(tokens, dtype=torch.int8)[:, None]
    scores = scores_of("normal", [1, heads, tokens])
    out = lkv_ext.evict(k, None, scores, [11, 12, 13])
    assert out.k.numel() > 2**31
    positions = out.positions.to(torch.int8)[:, None]
    assert torch.equal(out.k[:, :8], positions.expand(-1, 8)) and torch.equal(out.k[:, -8:], -positions.expand(-1, 8))
