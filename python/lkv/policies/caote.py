"""CAOTE (arXiv 2504.14051): a row is worth what its loss would change in the output, over the scores of any method.

Re-implemented from the paper: there is no authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lkv.policies.base import ScoreWrapper, refuse_second_pass
from lkv.policies.protocol import Observation, Policy
from lkv.policies.snapkv import SnapKV


@dataclass(frozen=True)
class CAOTE(ScoreWrapper):
    """Rows are scored by `a / (1 - a) * |o - v|`, where a are the scores of the head, of sum 1, and o the sum of a v.

    If a are the weights of a query, this is by how much its output changes when the row goes and the others share its
    weight. For H2O, TOVA and SnapKV they are the scores of that method, divided by their sum over the valid rows. The
    norm is that of L2; all is float32.

    The paper does not say how query heads of a group are reduced (here: as the scorer does it, before), nor where
    `1 - a` ends (here: at 1e-6).

    Attributes:
        scorer: a policy whose scores are not negative.
        fast: o is the plain mean of the valid rows (FastCAOTE).
    """

    scorer: Policy = field(default_factory=SnapKV)
    fast: bool = False

    nonnegative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_second_pass(self)
        if not getattr(self.scorer, "nonnegative", False):
            raise ValueError(
                "lkv.CAOTE: expected a scorer whose scores are weights, such as SnapKV, TOVA or H2O (nonnegative = "
                f"True), got {self.scorer}"
            )

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`, at least 0; 0 outside the valid rows."""
        valid = observation.valid()
        weights = self.scorer.score(layer, observation).float().masked_fill(~valid, 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        count = observation.lengths.clamp(min=1)
        scores = torch.empty_like(weights)
        for head in range(weights.shape[1]):  # one at a time: in float32 all would be twice the layer's values
            here, a = valid[:, head, :, None], weights[:, head]
            values = observation.values[:, head].float().masked_fill(~here, 0)
            mean = values.sum(1) / count[:, head, None] if self.fast else torch.bmm(a[:, None], values)[:, 0]
            change = torch.linalg.vector_norm(values - mean[:, None], dim=-1)
            scores[:, head] = a / (1 - a).clamp(min=1e-6) * change
        return scores


@dataclass(frozen=True)
class FastCAOTE(CAOTE):
    """CAOTE with the plain mean of the rows in the place of their weighted sum."""

    fast: bool = True
