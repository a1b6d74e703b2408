"""The reference itself, by hand: everything else is compared with it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import lkv_ext
from lkv import reference
from lkv.reference.budgets import apportion

NAN, INF = math.nan, math.inf


def rows(scores: list[float], keep: int, sink: int = 0, window: int = 0, start: int = 0, length: int | None = None):
    length = len(scores) - start if length is None else length
    valid = dict(start=start, length=length)
    return reference.select_row(torch.tensor(scores), keep, sink=sink, window=window, **valid).tolist()


def test_which_rows() -> None:
    scores = [0.0, 5.0, 1.0, 5.0, 2.0, 9.0, 0.0]
    assert rows(scores, 3) == [1, 3, 5] and rows(scores, 2) == [1, 5]  # of equal ones the lower
    assert rows(scores, 4, sink=1, window=2) == [0, 1, 5, 6]
    assert rows(scores, 3, sink=2, window=2) == [0, 1, 6]  # the sink goes first
    assert rows(scores, 1, sink=2, window=2) == [0] and rows(scores, 0, sink=2, window=2) == []
    assert rows(scores, 2, start=2, length=3) == [3, 4]
    assert rows(scores, 3, sink=1, window=1, start=2, length=4) == [2, 3, 5]
    assert rows(scores, 7, sink=5, window=5) == list(range(7))


def test_scores_that_are_no_numbers() -> None:
    scores = [NAN, -INF, 0.0, -0.0, INF, NAN, -1.0]
    assert [rows(scores, keep) for keep in range(8)] == [
        [], [4], [2, 4], [2, 3, 4], [2, 3, 4, 6], [1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5, 6],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "kept", "offsets", "cut"),
    [
        (dict(), [2, 0, 4], [0, 2, 2, 6], 0),
        (dict(reserve=1), [2, 0, 4], [0, 3, 4, 9], 0),
        (dict(reserve=1, align=4), [2, 0, 4], [0, 4, 8, 16], 0),
        (dict(max_budget=3), [2, 0, 3], [0, 2, 2, 5], 1),
        (dict(capacity=4), [2, 0, 2], [0, 2, 2, 4], 2),
        (dict(reserve=2, capacity=5), [2, 0, 0], [0, 4, 5, 5], 4),
        (dict(layout="padded"), [2, 0, 4], [0, 4, 8, 12], 0),
        (dict(layout="padded", reserve=1, align=2), [2, 0, 4], [0, 6, 12, 18], 0),
        (dict(layout="padded", capacity=3), [2, 0, 3], [0, 3, 6, 9], 1),
    ],
    ids=str,
)
def test_spans(options: dict, kept: list[int], offsets: list[int], cut: int) -> None:
    where = reference.spans([2, -1, 9], [5, 3, 4], **options)
    assert (where.kept, where.offsets, where.cut, where.total) == (kept, offsets, cut, offsets[-1])


def test_values_out_of_range_are_clamped() -> None:
    """As the operator does: starts in front of the rows and behind them, lengths of less than nothing and too many."""
    scores = torch.arange(12.0).view(4, 1, 3)
    starts, lengths = torch.tensor([[-2], [1], [2], [9]]), torch.tensor([[2], [9], [-1], [1]])
    out = reference.evict([scores], scores, torch.full((4, 1), 2), lengths=lengths, starts=starts)
    assert out.lengths.tolist() == [[2], [2], [0], [0]] and out.positions.tolist() == [0, 1, 1, 2]
    assert out.tensors[0].tolist() == [0.0, 1.0, 4.0, 5.0] and out.cu_seqlens.tolist() == [0, 2, 4, 4, 4]
    k = scores[..., None]
    ours = lkv_ext.evict(k, None, scores, 2, lengths=lengths, starts=starts)
    assert ours.positions.tolist() == out.positions.tolist() and ours.lengths.tolist() == out.lengths.tolist()
    whole = reference.evict([scores], scores, torch.full((4, 1), 2), starts=starts)
    assert whole.lengths.tolist() == [[2], [2], [1], [0]]


def test_gathered_rows() -> None:
    first, second = torch.tensor([[1.0, 1.5], [2.0, 2.5]]), torch.tensor([[3.0, 3.5]])
    moved = reference.gather([first, second], torch.tensor([1, -1, 0, 1, -1]), [0, 2, 4])
    assert moved.tolist() == [[2.0, 2.5], [0.0, 0.0], [3.0, 3.5], [0.0, 0.0], [0.0, 0.0]]
    assert reference.gather([first[:0]], torch.tensor([0]), [0, 1]).tolist() == [[0.0, 0.0]]


def test_attention() -> None:
    """Logits 0 and ln 3: weights 1/4 and 3/4; a sink of logit ln 4 takes half of it all; a cap brings them together."""
    k, v = torch.tensor([[0.0], [math.log(3)], [50.0]]), torch.tensor([[4.0], [8.0], [100.0]])
    cu, lengths = torch.tensor([0, 2, 3]), torch.tensor([[2, 1]])
    q = torch.ones(1, 4, 1, 1)

    def attend(**options: object) -> list[float]:
        return reference.attend(q, k, v, cu, lengths, **options).flatten().tolist()

    assert attend() == pytest.approx([7, 7, 100, 100])  # two query heads to a KV head
    assert attend(scale=0.0) == pytest.approx([6, 6, 100, 100])
    sinks = torch.tensor([math.log(4), -INF, 50.0, -INF])
    assert attend(sinks=sinks) == pytest.approx([3.5, 7, 50, 100])
    low = 1 / (1 + math.exp(0.1 * math.tanh(10 * math.log(3))))
    assert attend(softcap=0.1)[0] == pytest.approx(low * 4 + (1 - low) * 8)
    two = reference.attend(torch.ones(1, 2, 2, 1), k, v, cu, lengths).flatten().tolist()
    assert two == pytest.approx([4, 7, 0, 100])  # the first of two queries sees all rows but the last
    both = reference.attend(torch.ones(1, 2, 2, 1), k, v, cu, lengths, causal=False).flatten().tolist()
    assert both == pytest.approx([7, 7, 100, 100])
    wide = reference.attend(torch.ones(1, 1, 1, 4), torch.ones(1, 4), torch.ones(1, 1), cu[:2] // 2, lengths[:, 1:])
    assert wide.tolist() == [[[[1.0]]]]


def test_soft_masks() -> None:
    """Two scores on either side of the threshold; those that are there for sure, and those that are not there."""

    def mask(scores: list[float], k: float, temperature: float = 1.0, **options: object) -> list[float]:
        return reference.soft_topk(torch.tensor(scores), k, temperature, **options).tolist()

    high = 1 / (1 + math.exp(-2.0))
    assert mask([1.0, -3.0], 1.0) == pytest.approx([high, 1 - high])
    assert mask([1.0, -3.0], 1.0, 2.0) == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert mask([INF, 1.0, -INF, -3.0, NAN], 2.0) == pytest.approx([1, high, 0, 1 - high, 0])
    assert mask([3.0, 3.0, 9.0], 1.0, lengths=torch.tensor(2)) == pytest.approx([0.5, 0.5, 0])
    assert mask([3.0, 1.0], 0.0) == [0, 0] and mask([3.0, 1.0], 2.0) == [1, 1] == mask([3.0, 1.0], 5.0)
    logs = mask([1.0, -3.0, 5.0], 1.0, log=True, lengths=torch.tensor(2))
    assert logs[:2] == pytest.approx([math.log(high), math.log(1 - high)]) and logs[2] == -INF


def test_exact_shares() -> None:
    def shared(wishes: list[int], total: int, lower: list[int], upper: list[int]) -> list[int]:
        return apportion([Fraction(w) for w in wishes], total, lower, upper)

    assert shared([8, 1, 1], 20, [0, 0, 0], [6, 100, 100]) == [6, 7, 7]
    assert shared([1, 2, 3], 7, [0, 0, 0], [9, 9, 9]) == [1, 2, 4]
    assert shared([0, 1, 0], 13, [0, 0, 0], [10, 4, 10]) == [5, 4, 4]
    assert shared([6, 3, 1], 10, [3, 3, 2], [9, 9, 2]) == [5, 3, 2]
    assert shared([1, 1], -3, [0, 0], [5, 5]) == [0, 0] and shared([1, 1], 99, [0, 0], [5, 5]) == [5, 5]
    assert shared([1, 1], 1, [2, 0], [5, 5]) == [2, 0] and shared([3, 1], 4, [0, 0], [3, 9]) == [3, 1]
    assert shared([0, 0], 3, [0, 0], [5, 5]) == [2, 1] and shared([1, 0], 3, [0, 0], [5, 5]) == [3, 0]
