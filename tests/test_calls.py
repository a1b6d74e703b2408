"""What a call costs in Python, counted, not timed; and that what is remembered between calls is only what holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from cases import rows_of, scores_of

import lkv_ext

SCORES = scores_of("normal", [2, 3, 16])
K, V = (rows_of([2, 3, 16, 8], torch.bfloat16, i) for i in range(2))
OUT = lkv_ext.evict(K, V, SCORES, 5)
CALLS = {
    "select": lambda **sizes: lkv_ext.select(SCORES, **sizes),
    "evict": lambda **sizes: lkv_ext.evict(K, V, SCORES, **sizes),
    "evict into memory": lambda **sizes: lkv_ext.evict(K, V, SCORES, **sizes, out=OUT),
    "evict in place": lambda **sizes: lkv_ext.evict_(K.clone(), V.clone(), SCORES, **sizes),
}


def python_calls(call: Callable[[], object]) -> int:
    call()  # what is done once is done
    count = 0

    def see(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_integers_in_a_tensor(call: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Reading them takes two calls of Python each, the long form of an op one more: the checks are remembered."""
    plain = python_calls(lambda: call(budgets=5))
    budgets = torch.full(shape, 5, dtype=dtype)
    assert python_calls(lambda: call(budgets=budgets)) <= plain + 2
    lengths, starts = torch.tensor([16, 15], dtype=dtype), torch.zeros(2, dtype=dtype)
    assert python_calls(lambda: call(budgets=budgets, lengths=lengths, starts=starts)) <= plain + 7


def test_derivatives_need_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads the signature of such a function at every `apply`, which takes longer than a small op."""
    scores, k = SCORES.clone().requires_grad_(), K.float().requires_grad_()

    def refuse(*_: object) -> None:
        raise AssertionError("a signature was read")

    monkeypatch.setattr("inspect.signature", refuse)
    lkv_ext.soft_topk(scores, 5.0, 0.1).square().sum().backward()
    lkv_ext.evict(k, V, SCORES, 5).k.sum().backward()
    assert scores.grad is not None and k.grad is not None


@pytest.mark.parametrize("name", ["budgets", "lengths", "starts"])
def test_values_are_read_at_every_call(name: str) -> None:
    sizes = dict(budgets=torch.tensor([7, 7, 7]), lengths=torch.tensor([16, 9]), starts=torch.tensor([2, 3]))
    for value in (6, 4, 6):
        sizes[name].fill_(value)
        given = {key: values.tolist() for key, values in sizes.items()}
        mine, theirs = lkv_ext.select(SCORES, **sizes), lkv_ext.select(SCORES, **given)
        assert torch.equal(mine.positions, theirs.positions) and torch.equal(mine.lengths, theirs.lengths)
        assert mine.max_length == theirs.max_length


def test_views_are_read_as_they_lie() -> None:
    wide = torch.tensor([[1, 9], [2, 9], [3, 9]], dtype=torch.int32)
    assert lkv_ext.select(SCORES, wide[:, 0]).lengths.tolist() == [[1, 2, 3]] * 2
    both = torch.arange(6).view(3, 2).t()
    assert lkv_ext.select(SCORES, both).lengths.tolist() == both.tolist()


def test_shapes_are_checked_at_every_call() -> None:
    """The same values in another shape are another call."""
    values = torch.arange(6)
    lkv_ext.select(SCORES, values.view(2, 3))
    for shape in ((3, 2), (6,), (1, 6), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"lkv_ext.select: expected budgets of shape \[H\] = \[3\] or \[B, H\]"):
            lkv_ext.select(SCORES, values.view(shape))
    lkv_ext.select(SCORES, 5, lengths=values[:2])
    with pytest.raises(ValueError, match="lkv_ext.select: expected lengths of shape"):
        lkv_ext.select(SCORES, 5, lengths=values[:3])
    with pytest.raises(TypeError, match="lkv_ext.select: expected budgets of integers"):
        lkv_ext.select(SCORES, values[:3].float())
