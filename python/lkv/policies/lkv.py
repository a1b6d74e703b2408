"""LKV (arXiv 2605.06676): budgets and scores that were learned, by `lkv train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lkv_ext
from lkv.learn.head_budget import HeadBudget
from lkv.learn.token_scorer import TokenScorer
from lkv.policies.protocol import Observation, Policy


@dataclass(frozen=True)
class LKV:
    """A head's rows are scored by its own small MLP, and its budget is a share of the total that was learned.

    Either half may be exchanged: any policy as `scorer` gives LKV-H over other scores, a budget of kind "uniform" gives
    LKV-T with equal heads.

    Attributes:
        scorer: LKV-T, or a policy whose scores are used.
        budget: LKV-H, or one of its ablations.
        sink, window: rows at both ends that every head keeps, inside its budget.
    """

    scorer: TokenScorer | Policy
    budget: HeadBudget
    sink: int = 4
    window: int = 8

    @property
    def needs(self) -> frozenset[str]:
        if isinstance(self.scorer, TokenScorer):
            return frozenset({"pre_rope_keys"} if self.scorer.input == "kv" else {"hidden_states"})
        return self.scorer.needs

    @property
    def scope(self) -> str:
        return "model"

    @torch.no_grad()
    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`, standardised for every head."""
        if not isinstance(self.scorer, TokenScorer):
            return self.scorer.score(layer, observation)
        return self.scorer(layer, features(self.scorer, observation), observation.valid())

    @torch.no_grad()
    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        """For all layers, `[N, B, H]`."""
        if self.budget.static:
            tables = [
                self.budget.table(int(total[b]), lengths[:, b], self.sink + self.window)
                for b in range(lengths.shape[1])
            ]
            return torch.stack(tables, 1)
        biased = [s + bias[:, None] for s, bias in zip(scores, self.budget.bias(), strict=True)]
        options = dict(lengths=lengths, starts=starts, sink=self.sink, window=self.window)
        return lkv_ext.budgets_from_scores(biased, total, across="layers", **options)


def features(scorer: TokenScorer, observation: Observation) -> Tensor:
    """What a scorer reads of an observation: `[B, H, L, D + Dv]`, or `[B, 1, L, hidden]`."""
    if scorer.input == "kv":
        return torch.cat([observation.pre_rope_keys, observation.values], -1)
    return observation.hidden_states[:, None]
