"""LKV (arXiv 2605.06676): budgets and scores that were learned, by `lkv train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import lkv_ext
from lkv.policies.lkv.head_budget import HeadBudget
from lkv.policies.lkv.token_scorer import TokenScorer
from lkv.policies.protocol import Carried, Observation, Policy

# The protocol allows `ahead` in the place of `budgets`, which a type cannot express.
if TYPE_CHECKING:
    Base = Policy
else:
    Base = object


@dataclass(frozen=True)
class Learned(Base):
    """A head's rows are scored by its own small MLP, and its budget follows from what was learned of the head.

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
    def layers(self) -> int:
        return self.budget.layers

    @property
    def token_scorer(self) -> TokenScorer:
        """LKV-T. Raises TypeError where a policy scores in its place."""
        if not isinstance(self.scorer, TokenScorer):
            raise TypeError(f"lkv: expected a scorer that is learned, got {type(self.scorer).__name__}")
        return self.scorer

    @torch.no_grad()
    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`, on the scale of LKV-T where it scores."""
        if not isinstance(self.scorer, TokenScorer):
            return self.scorer.score(layer, observation)
        return self.scorer.scaled(self.raw(layer, observation), observation.valid())

    def raw(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`: what LKV-T gives before it is scaled."""
        scorer = self.token_scorer
        if scorer.input == "kv":
            return scorer.raw(layer, torch.cat([observation.part("pre_rope_keys"), observation.values], -1))
        raw = scorer.raw(layer, observation.part("hidden_states")[:, None])  # of tokens whose rows are gone, too
        return raw.gather(2, observation.positions.long().clamp(0, raw.shape[2] - 1))


class LKV(Learned):
    """Every head keeps a share of the total that is its own, whatever the text: layers are evicted one by one."""

    scope = "layer"

    def ahead(self, layer: int, rows: Tensor, lengths: Tensor) -> Tensor:
        """int64 `[B, H]` of one layer: its part of the table for these rows and lengths; see `Ahead`."""
        pairs = zip(rows.tolist(), lengths.tolist(), strict=True)
        return torch.stack([self.table(kept, length)[layer] for kept, length in pairs])

    def table(self, rows: int, length: int) -> Tensor:
        """int64 `[N, H]`: what every head keeps of a text, `rows` per head on average."""
        total = rows * self.budget.layers * self.budget.heads
        return self.budget.table(total, length, self.sink + self.window)


class LKVThreshold(Learned):
    """All tokens of all heads compete, with a bias for every head: budgets that depend on the text.

    Scores that are standardised are so over all tokens that a head has had, those included that are gone: sums go on
    from eviction to eviction, and with `cap=` a row is worth next to the others what it would be in the whole text.
    """

    scope = "model"

    @property
    def accumulates(self) -> bool:
        return isinstance(self.scorer, TokenScorer) and self.scorer.scale == "standard"

    @torch.no_grad()
    def accumulate(self, layer: int, observation: Observation, before: Carried | None) -> Carried:
        """float64, of every head: how many tokens it has had, sums of their scores and squares, and the next place."""
        raw, new, places = self.raw(layer, observation), observation.valid(), observation.positions.long()
        known = raw.new_zeros(*raw.shape[:2], 4, dtype=torch.float64)
        if before is not None and before.heads is not None:
            known = before.heads
            new = new & (places >= known[..., 3:].long())
        scores = raw.double().masked_fill(~new, 0)
        last = (places + 1).masked_fill(~new, 0).amax(-1).maximum(known[..., 3].long())
        sums = torch.stack([new.sum(-1).double(), scores.sum(-1), (scores**2).sum(-1)], -1) + known[..., :3]
        return Carried(heads=torch.cat([sums, last[..., None].double()], -1), scores=raw)

    @torch.no_grad()
    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`, on the scale of LKV-T where it scores; 0 outside the valid rows."""
        carried = observation.carried
        if not self.accumulates or carried is None or carried.heads is None or carried.scores is None:
            return super().score(layer, observation)
        count, total, squares, _ = carried.heads[..., None, :].unbind(-1)
        mean = total / count.clamp(min=1)
        deviation = (squares / count.clamp(min=1) - mean**2).clamp(min=0).add(1e-6).sqrt()
        return ((carried.scores - mean) / deviation).float().masked_fill(~observation.valid(), 0)

    @torch.no_grad()
    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        """int64 `[N, B, H]`."""
        biased = [s + bias.to(s.device)[:, None] for s, bias in zip(scores, self.budget.bias(), strict=True)]
        options: dict[str, Any] = dict(lengths=lengths, starts=starts, sink=self.sink, window=self.window)
        return lkv_ext.budgets_from_scores(biased, total, across="layers", **options)


def learned(scorer: TokenScorer | Policy, budget: HeadBudget, sink: int = 4, window: int = 8) -> Learned:
    """The policy that fits a kind of budget."""
    kind: type[Learned] = LKV if budget.static else LKVThreshold
    return kind(scorer, budget, sink, window)
