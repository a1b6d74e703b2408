"""Earlier layers of a call shrink as later ones arrive, for policies of scope "cascade": a bound on memory.

When a layer has attended, it is scored, and every layer so far is brought to its share of what the whole model keeps.
Shares only fall, so that in the end the rows are those of one plan for all layers. Rounding may move rows between
layers: until the last layer has come every head keeps `slack` rows more than its share. Beside the budget and these,
one layer at a time is whole, and 4 bytes for each of its rows stay until the call ends, or 8 where budgets of heads
are made of the scores of rows that are gone.
"""

from __future__ import annotations

from typing import Any, Generic

import torch
from torch import Tensor

from lkv.hf.observation import ObservedLayer
from lkv.hf.planning import EvictionPlan, L, check_budgets, check_heads, score
from lkv.hf.settings import Settings
from lkv.policies import Carried, Weighs
from lkv_ext.shared import apportion, keeps_tensors


class Cascade(Generic[L]):
    """The layers of one call that have attended.

    Attributes:
        layers: in the order in which they came.
        scores: `[B, H, P + 1]` of each by position, what is no row last.
        scored: scores `[B, H, L]`, lengths and starts `[B, H]` of each as it was before any eviction of this call.
        importance: `[B]` of each.
        carried: what has been accumulated of those that were not evicted since.
    """

    def __init__(self) -> None:
        self.layers: list[L] = []
        self.scores: list[Tensor] = []
        self.scored: list[tuple[Tensor, Tensor, Tensor]] = []
        self.importance: list[Tensor] = []
        self.carried: dict[int, Carried | None] = {}

    @keeps_tensors
    def plan(self, layer: L, settings: Settings) -> list[tuple[L, EvictionPlan]]:
        """What is evicted now that this layer has come; all layers that are not named keep what they have.

        Raises:
            ValueError: for scores and budgets of the policy that do not fit the rows.
        """
        policy = settings.policy
        check_heads([*self.layers, layer], policy)
        wanted = [settings.target(count) * layer.heads * layer.rank[1] for count in layer.token_counts]
        targets = [settings.target(count) for count in layer.token_counts]
        found, observed, self.carried[layer.index] = score(layer, policy, None, targets)
        length = int(observed.positions.shape[2]) if layer.rows is None else layer.rows.seen
        by_place = found.new_zeros(*found.shape[:2], length + 1)
        at = observed.positions.long().masked_fill(~observed.valid(), length)
        self.scores.append(by_place.scatter_(2, at, found))
        nested = getattr(policy, "nested", False)
        if not nested:
            self.scored.append((found, observed.lengths, observed.starts))
        if isinstance(policy, Weighs):
            self.importance.append(policy.importance(layer.rank[0], observed, found))
        self.layers.append(layer)
        complete = len(self.layers) == layer.rank[1]
        there = [sum(counts) for counts in zip(*(x.row_counts for x in self.layers), strict=True)]
        totals = [self._share(*each, settings) for each in zip(wanted, layer.token_counts, strict=True)]
        totals = list(map(min, totals, there))
        if totals == there:
            return [(x, EvictionPlan(None, None, x.row_counts)) for x in self.layers] if complete else []
        rows = [_rows(x) for x in self.layers]
        scores = [s.gather(2, at.clamp(min=0)) for s, (at, _, _) in zip(self.scores, rows, strict=True)]
        lengths, starts = (torch.stack([x[n].to(found.device) for x in rows]) for n in (1, 2))
        more: dict[str, Any] = {"importance": torch.stack(self.importance)} if self.importance else {}
        shown, of, first = scores, lengths, starts
        if not nested:
            shown = [each for each, _, _ in self.scored]
            of, first = (torch.stack([each[n].to(found.device) for each in self.scored]) for n in (1, 2))
        budgets = policy.budgets(shown, of, torch.tensor(totals, device="cpu"), starts=first, **more)
        check_budgets(policy, budgets, lengths.shape)
        budgets = budgets.to(lengths.device).clamp(min=0)
        budgets = within(budgets, lengths) if complete else (budgets + getattr(policy, "slack", 1)).minimum(lengths)
        counts = budgets.sum(2).tolist()
        return [
            (x, EvictionPlan(s, b, n, policy.sink, policy.window, self.carried.pop(x.index, None)))
            for x, s, b, n in zip(self.layers, scores, budgets.unbind(0), counts, strict=True)
            if complete or n != x.row_counts
        ]

    def _share(self, wanted: int, length: int, settings: Settings) -> int:
        """Of a total of all layers, what those that have come may keep: the others have their protected rows."""
        layers, heads = self.layers[0].rank[1], self.layers[0].heads
        ends = min(settings.policy.sink + settings.policy.window, length)
        later = layers - len(self.layers)
        return max(wanted - later * heads * ends, wanted * len(self.layers) // layers)


def within(budgets: Tensor, there: Tensor) -> Tensor:
    """Budgets `[N, B, H]` of the same total, none above what is there: what rounding has cost a head goes to others."""
    if not bool((budgets > there).any()):
        return budgets
    flat, caps = (x.transpose(0, 1).flatten(1) for x in (budgets, there))
    found = apportion(flat.double(), flat.sum(1).minimum(caps.sum(1)), torch.zeros_like(flat), caps)
    return found.view(flat.shape[0], len(budgets), -1).transpose(0, 1)


def _rows(layer: ObservedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Positions `[B, H, L]` of the rows, how many are valid and where they begin, `[B, H]` each."""
    if layer.rows is not None:
        lengths = layer.rows.lengths.long()
        return layer.rows.padded(layer.rows.positions).long(), lengths, torch.zeros_like(lengths)
    keys = layer.whole()[0]
    batch, heads, length = keys.shape[:3]
    lengths = torch.tensor(layer.token_counts, device=keys.device)[:, None].expand(batch, heads)
    return torch.arange(length, device=keys.device).expand(batch, heads, length), lengths, length - lengths
