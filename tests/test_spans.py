"""Index arithmetic of packed rows, and the facts of their spans, against loops over the spans."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import lkv_ext
from lkv_ext._torch import spans
from lkv_ext.ragged import block_table


@st.composite
def drawn_spans(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """B, H and where spans begin and end, from an offset on that need not be 0."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(0, 5), min_size=batch * heads, max_size=batch * heads))
    ends = [draw(st.integers(0, 3))]
    for size in sizes:
        ends.append(ends[-1] + size)
    return batch, heads, ends


def begin_and_end(ends: list[int], i: int) -> tuple[int, int]:
    return ends[i], ends[i + 1]


@given(drawn_spans(), st.integers(0, 3))
def test_padded_and_packed(given: tuple[int, int, list[int]], more: int) -> None:
    batch, heads, ends = given
    total, columns = ends[-1] + more, max(b - a for a, b in pairwise(ends)) + more
    offsets = torch.tensor(ends, dtype=torch.int32)
    rows = torch.arange(total * 2).view(total, 2)
    wide = spans.padded(rows, offsets, batch, columns) if total else None
    scores = torch.arange(batch * heads * columns).view(batch, heads, columns).float()
    flat = spans.packed(scores, offsets, total)
    assert flat.shape == (total,) and (wide is None or wide.shape == (batch, heads, columns, 2))
    for i in range(batch * heads):
        b, h = divmod(i, heads)
        begin, end = begin_and_end(ends, i)
        assert wide is None or torch.equal(wide[b, h, : end - begin], rows[begin:end])
        assert torch.equal(flat[begin:end], scores[b, h, : end - begin])


def test_nothing_to_pack() -> None:
    offsets = torch.zeros(3, dtype=torch.int32)
    assert spans.packed(torch.zeros(1, 2, 0), offsets, 4).tolist() == [0, 0, 0, 0]
    assert spans.packed(torch.zeros(0, 2, 3), torch.zeros(1, dtype=torch.int32), 0).shape == (0,)
    assert spans.padded(torch.zeros(0, 5), torch.zeros(1, dtype=torch.int32), 0, 0).shape[0] == 0


@given(drawn_spans(), st.data())
def test_rows_of(given: tuple[int, int, list[int]], data: st.DataObject) -> None:
    batch, heads, ends = given
    chosen = data.draw(st.lists(st.integers(0, batch * heads - 1), max_size=6))
    rows, offsets = spans.rows_of(torch.tensor(ends, dtype=torch.int32), torch.tensor(chosen, dtype=torch.int64))
    expected, after = [], [0]
    for i in chosen:
        expected += range(*begin_and_end(ends, i))
        after.append(len(expected))
    assert rows.tolist() == expected
    assert offsets.tolist() == after and offsets.dtype == torch.int32


@given(drawn_spans(), st.integers(1, 4), st.integers(0, 20))
def test_block_tables(given: tuple[int, int, list[int]], align: int, longest: int) -> None:
    _, _, ends = given
    total = ends[-1] * align
    table = block_table(torch.tensor(ends, dtype=torch.int32) * align, align, longest, total)
    assert table.dtype == torch.int32 and table.shape == (len(ends) - 1, -(-longest // align))
    for i, begin in enumerate(ends[:-1]):
        assert table[i].tolist() == [min(begin + page, max(ends[-1] - 1, 0)) for page in range(table.shape[1])]


def made(layout: str = "packed", **options: object) -> lkv_ext.RaggedKV:
    generator = torch.Generator().manual_seed(3)
    ks, vs = ([torch.randn(2, 3, 9, dim, generator=generator) for _ in range(3)] for dim in (4, 5))
    scores = torch.randn(3, 2, 3, 9, generator=generator)
    budgets = torch.randint(0, 9, (3, 2, 3), generator=generator).tolist()
    companions = [[scores[i] for i in range(3)]]
    return lkv_ext.evict_layers(ks, vs, scores, budgets, layout=layout, companions=companions, **options)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("options", [{}, dict(reserve=2), dict(align=4)], ids=str)
def test_layers_are_views(layout: str, options: dict) -> None:
    joint = made(layout, **options)
    for i, same in ((0, -3), (1, -2), (2, -1)):
        layer, again = joint.layer(i), joint.layer(same)
        assert torch.equal(layer.cu_seqlens, again.cu_seqlens) and torch.equal(layer.lengths, joint.lengths[i])
        assert layer.lengths.shape == (2, 3) and layer.cu_seqlens.shape == (7,)
        assert (layer.reserve, layer.align, layer.max_length) == (joint.reserve, joint.align, joint.max_length)
        if layout == "packed":
            assert layer.k is joint.k and layer.v is joint.v and layer.companions is joint.companions
            assert torch.equal(layer.cu_seqlens, joint.cu_seqlens[i * 6 : i * 6 + 7])
        else:
            for part in ("k", "v", "positions"):
                assert getattr(layer, part).data_ptr() == getattr(joint, part)[i].data_ptr()
            assert torch.equal(layer.companions[0], joint.companions[0][i]) and len(layer.companions) == 1
            assert layer.cu_seqlens.tolist() == [n * layer.k.shape[2] for n in range(7)]
    for wrong in (3, -4):
        with pytest.raises(IndexError, match=rf"layer: expected i in \[0, 3\), got {wrong}"):
            joint.layer(wrong)
    with pytest.raises(TypeError, match=r"lkv_ext\.RaggedKV\.layer: expected i as an int"):
        joint.layer(1.0)
    with pytest.raises(ValueError, match=r"expected lengths of shape \[N, B, H\], got \[2, 3\]"):
        joint.layer(0).layer(0)


def test_no_values_have_layers_too() -> None:
    k = [torch.zeros(1, 2, 4, 3)] * 2
    joint = lkv_ext.evict_layers(k, None, [x[..., 0] for x in k], 2, layout="padded")
    assert joint.v is None and joint.layer(1).v is None and joint.layer(1).k.shape == (1, 2, 2, 3)


def test_index_pages_and_words() -> None:
    kv = made(align=4, reserve=1).layer(1)
    index = kv.index
    for part in ("positions", "lengths", "cu_seqlens"):
        assert getattr(index, part) is getattr(kv, part)
    assert index.max_length == kv.max_length and index.overflow is kv.overflow is None
    assert kv.block_table.shape == (6, -(-(kv.max_length + 1) // 4)) and made().block_table is None
    total = kv.positions.numel()
    words = f"packed, {total} rows with slack, lengths=[2, 3], max_length={kv.max_length}, cpu)"
    assert repr(index) == f"RaggedIndex({words}"
    assert repr(kv) == f"RaggedKV(k=[{total}, 4], v=[{total}, 5], torch.float32, 1 companions, {words}"
    alone = lkv_ext.evict(torch.zeros(1, 1, 4, 3), None, torch.zeros(1, 1, 4), 2, layout="padded")
    assert repr(alone).startswith("RaggedKV(k=[1, 1, 2, 3], v=None, torch.float32, 0 companions, padded, 2 rows")


def test_trees_of_tensors() -> None:
    """Tensors are leaves; how spans were made is part of the structure, and comes back."""
    k = torch.zeros(1, 2, 4, 3)
    made = [lkv_ext.evict(k, k, k[..., 0], 2, reserve=n, align=2, companions=[k[..., 0]]) for n in (2, 4)]
    kv, other = (replace(x, overflow=torch.zeros((), dtype=torch.int32)) for x in made)
    for value, count in ((kv, 7), (kv.index, 4)):
        leaves, spec = pytree.tree_flatten(value)
        again = pytree.tree_unflatten([x + 1 for x in leaves], spec)
        assert type(again) is type(value) and again.max_length == value.max_length == 2 and len(leaves) == count
        assert torch.equal(again.positions, value.positions + 1) and again.overflow == 1
    again = pytree.tree_map(lambda x: x + 1, kv)
    assert (again.reserve, again.align) == (2, 2) and torch.equal(again.companions[0], kv.companions[0] + 1)
    assert pytree.tree_structure(kv) != pytree.tree_structure(other)
    assert pytree.tree_structure(kv) == pytree.tree_structure(replace(kv))
