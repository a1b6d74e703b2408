"""The slopes of soft_topk as torch operations: for tangents, and wherever a derivative is itself differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

_COLDEST = 1e-6  # what a temperature counts as, at least


class Slopes:
    """The derivative of a mask at one point, computed from the mask alone; formulas as in `soft_topk`.

    Rows of which everything or nothing is kept have a weight of 0 and slope 0. Missing scores have slope 0.
    """

    def __init__(self, mask: Tensor, weights: Tensor, temperature: Tensor | float, log: bool) -> None:
        """
        Args:
            mask: `[..., n]`, as the op returns it.
            weights: `[...]`, as the op returns them.
            temperature: a number, or a tensor that broadcasts to `[...]`.
            log: whether the mask is the logarithm of one.
        """
        tiny = torch.finfo(mask.dtype).tiny
        moves = (weights > 0)[..., None]
        if log:
            moves = moves & (mask > -torch.inf)
            mask = torch.where(moves, mask, -1.0)
            m, rest = mask.exp(), -torch.expm1(mask)
            self.u = mask - rest.clamp_min(tiny).log()
        else:
            m, rest = mask, 1 - mask
            self.u = m.clamp_min(tiny).log() - rest.clamp_min(tiny).log()
        self.w = torch.where(moves, m * rest, 0)
        self.slope = torch.where(moves, rest, 0) if log else self.w  # of the mask in u
        total = self.w.sum(-1, keepdim=True)
        least = weights[..., None]  # more than the sum where that was too small to divide by
        self.weight = torch.where(total < 0.999 * least, least, total).clamp_min(tiny)
        if not isinstance(temperature, Tensor):
            temperature = max(temperature, _COLDEST)
        else:
            temperature = torch.where(temperature > _COLDEST, temperature, _COLDEST)[..., None]
        self.temperature = temperature

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of scores `[..., n]`, k `[...]` and temperature `[...]` from that of the mask."""
        a = torch.where(self.slope > 0, self.slope * grad, 0)
        mean = a.sum(-1, keepdim=True) / self.weight
        of_u = a - self.w * mean
        of_temperature = -(of_u * self.u).sum(-1, keepdim=True) / self.temperature
        return of_u / self.temperature, mean[..., 0], of_temperature.expand_as(mean)[..., 0]

    def forward(self, scores: Tensor | None, k: Tensor | None, temperature: Tensor | None) -> Tensor:
        """The tangent of the mask from those of scores, k and temperature; None: it does not move."""
        moved = torch.zeros_like(self.w) if scores is None else scores.to(self.w.dtype)
        if temperature is not None:
            moved = moved - self.u * temperature[..., None]
        threshold = (self.w * moved).sum(-1, keepdim=True)
        if k is not None:
            threshold = threshold - self.temperature * k[..., None]
        return self.slope * (moved - threshold / self.weight) / self.temperature
