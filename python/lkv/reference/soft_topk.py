"""The relaxation of top-k whose mask sums to k: bisection for the threshold, gradients by their formulas."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_FLOOR = -1e4
BISECTIONS = 200


def soft_topk_row(scores: Tensor, k: Tensor, temperature: Tensor, log: bool) -> Tensor:
    """One row `[n]`, float64, differentiable; `k` and `temperature` without axes."""
    there = scores > -torch.inf  # false for NaN
    infinite = scores == torch.inf
    finite = there & ~infinite
    mask = torch.where(there, 0.0 if not log else LOG_FLOOR, -torch.inf if log else 0.0).to(scores)
    mask = torch.where(infinite, 0.0 if log else 1.0, mask)
    kept = k - infinite.sum()
    if kept <= 0:
        return mask
    if kept >= finite.sum():
        return torch.where(finite, 0.0 if log else 1.0, mask)
    s = scores[finite]
    tau = threshold(s.detach(), kept.detach(), temperature.detach())
    u = (s.detach() - tau) / temperature.detach()
    w = torch.sigmoid(u) * torch.sigmoid(-u)
    weight = w.sum().clamp(min=1e-6 * len(s))
    # As tau is a function of all three: its slopes, on a value that is right already.
    slope = (w * s).sum() / weight - kept * temperature.detach() / weight - temperature * (w * u).sum() / weight
    tau = tau + slope - slope.detach()
    u = (s - tau) / temperature
    return mask.masked_scatter(finite, torch.nn.functional.logsigmoid(u) if log else torch.sigmoid(u))


def threshold(scores: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
    """tau with `sigmoid((scores - tau) / temperature).sum() == k`, for finite scores and 0 < k < n."""
    offset = temperature * torch.logit(k / len(scores))
    low, high = scores.min() - offset, scores.max() - offset
    for _ in range(BISECTIONS):
        tau = (low + high) / 2
        if torch.sigmoid((scores - tau) / temperature).sum() > k:
            low = tau
        else:
            high = tau
    return (low + high) / 2


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    temperature: float | Tensor,
    lengths: Tensor | None = None,
    log: bool = False,
) -> Tensor:
    """`sigmoid((scores - tau) / temperature)`, tau of every row such that it sums to k; or its logarithm.

    Args:
        scores: `[..., n]`.
        k, temperature, lengths: numbers, or tensors that broadcast to `[...]`.

    Returns:
        float64 `[..., n]`. Behind the length of a row, and for scores of -inf and NaN: 0, or -inf.
    """
    leading, n = scores.shape[:-1], scores.shape[-1]
    k, temperature = (
        torch.as_tensor(x, dtype=torch.float64).broadcast_to(leading).reshape(-1) for x in (k, temperature)
    )
    lengths = torch.as_tensor(n if lengths is None else lengths).broadcast_to(leading).reshape(-1)
    rows = []
    for row, length, row_k, row_t in zip(scores.double().reshape(-1, n), lengths.tolist(), k, temperature, strict=True):
        there = torch.arange(n) < length
        rows.append(soft_topk_row(row.masked_fill(~there, -torch.inf), row_k, row_t, log))
    return torch.stack(rows).view(scores.shape) if rows else scores.double()
