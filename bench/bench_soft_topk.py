"""soft_topk, forward and with its gradient, beside the best composition of PyTorch: Newton in a bracket, in place.

Each thread has its rows; on a machine that is busy otherwise, `--threads 1` compares what the two compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import Bench, each
from timing import Call
from torch import Tensor
from torch.autograd import Function

import lkv_ext

STEPS = 32


@dataclass(frozen=True)
class Rows:
    """`[rows, length]` scores, of which `retention` is kept; the fields that a result names."""

    rows: int
    length: int
    temperature: float = 0.1
    retention: float = 0.15

    def __str__(self) -> str:
        return f"[{self.rows}, {self.length}] fp32 {100 * self.retention:g}% T={self.temperature:g}"


class Composed(Function):
    """The best of PyTorch: one buffer, four passes a step, moments for a start, the gradient by its formula."""

    @staticmethod
    def forward(ctx, scores: Tensor, k: Tensor, temperature: float) -> Tensor:
        scaled = scores * (1 / temperature)
        # aminmax and std_mean would take ten times as long as these here.
        low, high = scaled.amin(-1, keepdim=True), scaled.amax(-1, keepdim=True)
        mean = scaled.mean(-1, keepdim=True)
        square = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).square_().div_(scores.shape[-1])
        variance = (square - mean**2).clamp_min_(0)
        offset = torch.logit(k / scores.shape[-1])
        low, high = low - offset, high - offset
        tau = (mean - (1 + 0.304 * variance).sqrt_() * offset).clamp_(low, high)
        mask = torch.empty_like(scores)
        for _ in range(STEPS):
            torch.sub(scaled, tau, out=mask).sigmoid_()
            total = mask.sum(-1, keepdim=True)
            weight = total - torch.linalg.vector_norm(mask, dim=-1, keepdim=True).square_()
            excess = total - k
            if bool((excess.abs() <= 2e-6 * k).all()):
                break
            low, high = torch.where(excess > 0, tau, low), torch.where(excess > 0, high, tau)
            step = tau + excess / weight
            tau = torch.where((step > low) & (step < high), step, (low + high) / 2)
        ctx.save_for_backward(mask, weight)
        ctx.temperature = temperature
        return mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        mask, weight = ctx.saved_tensors
        w = torch.addcmul(mask, mask, mask, value=-1)
        mean = torch.linalg.vecdot(w, grad, dim=-1).unsqueeze_(-1).div_(weight)
        return torch.sub(grad, mean).mul_(w).mul_(1 / ctx.temperature), mean, None


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
@each("shape", Rows(32, 4096), Rows(32, 32768), Rows(8, 131072), Rows(8, 131072, temperature=0.01))
def test_soft_topk(bench: Bench, shape: Rows, log: bool, gradient: bool) -> None:
    def ours(scores: Tensor, k: Tensor) -> Tensor:
        return lkv_ext.soft_topk(scores, k, shape.temperature, log=log)

    def composed(scores: Tensor, k: Tensor) -> Tensor:
        mask = Composed.apply(scores, k[:, None], shape.temperature)
        return mask.log() if log else mask

    with torch.inference_mode(False):
        generator = torch.Generator(bench.device).manual_seed(1)
        sizes, options = (shape.rows, shape.length), dict(generator=generator, device=bench.device)
        scores, upstream = torch.randn(sizes, **options), torch.randn(sizes, **options)
        k = torch.rand(shape.rows, **options).add_(0.5).mul_(shape.retention * shape.length)
        leaves = [t.requires_grad_(gradient) for t in (scores, k)]

    def call(op: Callable[[Tensor, Tensor], Tensor]) -> Call:
        def with_gradient() -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(op(*leaves), leaves, upstream)

        return with_gradient if gradient else lambda: op(*leaves)

    if not log:
        for mine, theirs in zip(call(ours)(), call(composed)(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=5e-3, atol=1e-3 * float(theirs.abs().max()))
    op, mode = "soft_topk log" if log else "soft_topk", "both" if gradient else "fwd"
    bench.time(op, mode, shape, call(ours), {"best": call(composed)}, (5 if gradient else 2) * scores.nbytes)
