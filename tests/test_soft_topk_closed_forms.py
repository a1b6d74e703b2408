"""soft_topk beside what can be written down: closed forms, a bisection of its own, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from cases import generator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lkv_ext


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def bisected(scores: list[float], k: float, temperature: float) -> list[float]:
    """In Python's own numbers."""
    low, high = min(scores) - 800 * temperature, max(scores) + 800 * temperature
    for _ in range(200):
        tau = (low + high) / 2
        if sum(sigmoid((s - tau) / temperature) for s in scores) > k:
            low = tau
        else:
            high = tau
    return [sigmoid((s - low) / temperature) for s in scores]


@given(
    difference=st.floats(-8, 8),
    k=st.floats(0.05, 1.95),
    temperature=st.floats(0.05, 3),
    shift=st.floats(-50, 50),
)
def test_two_scores(difference: float, k: float, temperature: float, shift: float) -> None:
    """With a = exp(difference / 2 T), x = exp(-tau / T) solves (2 - k) x^2 + (1 - k) (a + 1 / a) x = k."""
    a = math.exp(difference / temperature / 2)
    b = (1 - k) * (a + 1 / a)
    root = math.sqrt(b * b + 4 * k * (2 - k))
    x = 2 * k / (b + root) if b > 0 else (root - b) / (2 * (2 - k))
    want = torch.tensor([a * x / (1 + a * x), x / (a + x)], dtype=torch.float64)
    scores = torch.tensor([difference + shift, shift], dtype=torch.float64)
    torch.testing.assert_close(lkv_ext.soft_topk(scores, k, temperature), want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lkv_ext.soft_topk(scores, k, temperature, log=True).exp(), want, rtol=1e-6, atol=1e-9)
    got = lkv_ext.soft_topk(scores.float(), k, temperature).double()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * (1 + 1 / temperature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log", [False, True])
@given(n=st.integers(1, 40), share=st.floats(0.02, 0.98), temperature=st.floats(0.05, 2))
def test_equal_scores_share_evenly(dtype: torch.dtype, log: bool, n: int, share: float, temperature: float) -> None:
    """m = k / n for all, and the gradients of it: 1 / n to k, upstream less its mean to the scores, none to T."""
    scores = torch.full((n,), 0.75, dtype=dtype, requires_grad=True)
    k = torch.tensor(share * n, dtype=dtype, requires_grad=True)
    t = torch.tensor(temperature, dtype=dtype, requires_grad=True)
    mask = lkv_ext.soft_topk(scores, k, t, log=log)
    m = torch.full((n,), share, dtype=dtype)
    torch.testing.assert_close(mask, m.log() if log else m, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(n, generator=generator(n)).to(dtype)
    to_scores, to_k, to_t = torch.autograd.grad(mask, (scores, k, t), upstream)
    slope = 1 / share if log else 1.0  # of log m in m
    scale = share * (1 - share) * slope / temperature
    close = dict(rtol=1e-3, atol=1e-4 * (1 + scale) * (1 + slope))
    torch.testing.assert_close(to_scores, scale * (upstream - upstream.mean()), **close)
    torch.testing.assert_close(to_k, slope * upstream.mean(), **close)
    torch.testing.assert_close(to_t, torch.zeros_like(t), **close)


@given(
    scores=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    share=st.floats(0.03, 0.97),
    temperature=st.floats(0.05, 2),
)
def test_any_scores(scores: list[float], share: float, temperature: float) -> None:
    """Values beside a bisection, and their change beside that of the bisection for k, T and each score."""
    k, h = share * len(scores), 1e-5
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scores, k, temperature)]
    mask = lkv_ext.soft_topk(*leaves)
    want = torch.tensor(bisected(scores, k, temperature), dtype=torch.float64)
    torch.testing.assert_close(mask, want, rtol=1e-6, atol=1e-8)
    weights = torch.linspace(-1, 2, len(scores), dtype=torch.float64)
    to_scores, to_k, to_t = torch.autograd.grad((mask * weights).sum(), leaves)

    def total(scores: list[float], k: float, temperature: float) -> float:
        return sum(float(w) * m for w, m in zip(weights, bisected(scores, k, temperature), strict=True))

    if sum(m * (1 - m) for m in want.tolist()) < 1e-3:  # too steep for differences
        return
    close = dict(rel=2e-3, abs=2e-4 * (1 + 1 / temperature))
    slope = (total(scores, k + h, temperature) - total(scores, k - h, temperature)) / (2 * h)
    assert to_k.item() == pytest.approx(slope, **close)
    slope = (total(scores, k, temperature + h) - total(scores, k, temperature - h)) / (2 * h)
    assert to_t.item() == pytest.approx(slope, **close)
    for i in {0, len(scores) - 1}:
        up, down = ([s + sign * h * (j == i) for j, s in enumerate(scores)] for sign in (1, -1))
        slope = (total(up, k, temperature) - total(down, k, temperature)) / (2 * h)
        assert to_scores[i].item() == pytest.approx(slope, **close)


def test_the_gradient_of_a_share_reaches_the_loss_through_k() -> None:
    """dL/dk is the mean of the upstream gradient, weighted with m (1 - m)."""
    scores, upstream = torch.randn(3, 50, generator=generator(1)).double(), torch.randn(3, 50).double()
    k = torch.tensor([5.5, 20.0, 44.25], dtype=torch.float64, requires_grad=True)
    mask = lkv_ext.soft_topk(scores, k, 0.4)
    (got,) = torch.autograd.grad(mask, k, upstream)
    w: Tensor = (mask * (1 - mask)).detach()
    torch.testing.assert_close(got, (w * upstream).sum(-1) / w.sum(-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("again", [False, True], ids=["kernel", "differentiated again"])
@pytest.mark.parametrize("cold", [1e-9, torch.tensor(1e-9), torch.tensor(-1.0)], ids=["number", "tensor", "negative"])
def test_the_least_temperature_holds_for_slopes(cold: float | Tensor, again: bool) -> None:
    """Slopes of equal scores: w (g - mean g) / T, T being 1e-6."""
    scores = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64)
    mask = lkv_ext.soft_topk(scores, 1.0, cold)
    (got,) = torch.autograd.grad(mask, scores, upstream, create_graph=again)
    torch.testing.assert_close(got.detach(), 3 / 16 * (upstream - 3) / 1e-6, rtol=1e-6, atol=0)


@pytest.mark.parametrize("again", [False, True], ids=["kernel", "differentiated again"])
def test_where_no_score_is_near_the_threshold_k_has_next_to_no_slope(again: bool) -> None:
    """W counts as 1e-6 for each score: of the true one, of 4e-22, the slope in k would be 1."""
    scores, k = torch.tensor([0.0, 100.0]), torch.tensor(1.0, requires_grad=True)
    mask = lkv_ext.soft_topk(scores, k, 1.0)
    (got,) = torch.autograd.grad(mask.sum(), k, create_graph=again)
    assert 0 <= got.item() < 1e-9
