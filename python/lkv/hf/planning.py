"""What is kept of the layers of a cache: first all that may fail is asked and checked, then every layer is evicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lkv.hf.checks import check_budgets, check_scores
from lkv.hf.observation import observe
from lkv.hf.settings import Settings
from lkv.policies import Ahead, Observation, Policy
from lkv_ext.shared import keeps_tensors

if TYPE_CHECKING:
    from lkv.hf.layer import RaggedLayer


@dataclass
class EvictionPlan:
    """Rows by score.

    Attributes:
        scores: float `[B, H, L]`; None: all rows stay.
        budgets: int `[B, H]`; None with the scores.
        row_counts: per sequence, rows of all heads together that will be left.
        sink, window: the first and last rows of every head that stay whatever their scores.
    """

    scores: Tensor | None
    budgets: Tensor | None
    row_counts: list[int]
    sink: int = 0
    window: int = 0


@keeps_tensors
def evict(
    layers: Sequence[RaggedLayer],
    settings: Settings,
    rows: int | None = None,
    scores: Sequence[Tensor] | None = None,
) -> None:
    """Brings every sequence to `rows` per head, or to what the settings say of its logical length.

    With scope "layer" every layer has its own total, with scope "model" they share one. `scores`, `[B, H, L]` for each
    layer, stand for what the policy would say.

    Raises:
        ValueError: for answers of the policy that do not fit; no layer is evicted then.
    """
    given = [None] * len(layers) if scores is None else list(scores)
    if settings.policy.scope == "model":
        plans = _choose_together(layers, settings, rows, given)
    else:
        plans = [_choose(layer, settings, rows, s) for layer, s in zip(layers, given, strict=True)]
    for layer, plan in zip(layers, plans, strict=True):
        layer.keep(plan, settings.reserve)
        plan.scores = None  # a layer's are gone with its rows


@keeps_tensors
def hide(layers: Sequence[RaggedLayer], leaving: Tensor, reserve: int) -> None:
    """Evicts the rows of some tokens, which a mask has hidden: bool `[B, L]`, by position."""
    for layer in layers:
        counts = [count - gone for count, gone in zip(layer.token_counts, leaving.sum(1).tolist(), strict=True)]
        due = layer.due
        layer.keep(_choose_others(layer, leaving), reserve)
        layer.token_counts, layer.due = counts, due
        layer.observations.hide(leaving)


def _choose_others(layer: RaggedLayer, leaving: Tensor) -> EvictionPlan:
    """All rows but those of some tokens."""
    observed = observe(layer, frozenset(), 0)
    index = observed.positions.long().clamp(0, leaving.shape[1] - 1)
    leaves = leaving.to(index.device)[:, None].expand(*index.shape[:2], -1).gather(2, index)
    stays = observed.valid() & ~leaves
    budgets = stays.sum(2).cpu()
    return EvictionPlan(stays.float(), budgets, budgets.sum(1).tolist())


def _wanted(layer: RaggedLayer, settings: Settings, rows: int | None) -> list[int]:
    return [layer.heads * (settings.target(counts) if rows is None else rows) for counts in layer.token_counts]


def _score(layer: RaggedLayer, policy: Policy, given: Tensor | None) -> tuple[Tensor, Observation]:
    observed = observe(layer, policy.needs if given is None else frozenset(), policy.window)
    scores = policy.score(layer.index, observed) if given is None else given
    check_scores(policy, scores, observed)
    return scores, observed


def one_total(policy: Policy) -> bool:
    """Whether all layers share what is kept, rather than each having its own total."""
    return policy.scope == "model" or isinstance(policy, Ahead)


def _choose(layer: RaggedLayer, settings: Settings, rows: int | None, given: Tensor | None) -> EvictionPlan:
    policy = settings.policy
    if isinstance(policy, Ahead):
        return _choose_ahead(layer, settings, rows, given)
    totals = list(map(min, layer.row_counts, _wanted(layer, settings, rows)))
    if totals == layer.row_counts:
        return EvictionPlan(None, None, totals)
    scores, observed = _score(layer, policy, given)
    budgets = policy.budgets(scores, observed.lengths, torch.tensor(totals), starts=observed.starts)
    check_budgets(policy, budgets, observed.lengths.shape)
    budgets = budgets if budgets.is_cpu else _within(budgets, totals)
    return EvictionPlan(scores, budgets, totals, policy.sink, policy.window)


def _choose_ahead(layer: RaggedLayer, settings: Settings, rows: int | None, given: Tensor | None) -> EvictionPlan:
    policy, counts = settings.policy, layer.token_counts
    wanted = [min(n, settings.target(n) if rows is None else rows) for n in counts]
    if wanted == counts:
        return EvictionPlan(None, None, layer.row_counts)
    scores, observed = _score(layer, policy, given)
    budgets = policy.ahead(layer.index, torch.tensor(wanted), torch.tensor(counts))
    check_budgets(policy, budgets, observed.lengths.shape)
    # Whole rows are as many as there are tokens; of packed ones only the device knows.
    there = torch.tensor(counts)[:, None] if layer.rows is None else observed.lengths.cpu()
    budgets = budgets.clamp(min=0).minimum(there)
    return EvictionPlan(scores, budgets, budgets.sum(1).tolist(), policy.sink, policy.window)


def _within(budgets: Tensor, totals: list[int]) -> Tensor:
    """Budgets on a GPU, where nobody reads them, cut so that they do not pass the totals that memory is made for."""
    left = torch.tensor(totals, device=budgets.device)[:, None]
    budgets = budgets.clamp(min=0)
    return budgets.minimum((left + budgets - budgets.cumsum(1)).clamp(min=0))


def _choose_together(
    layers: Sequence[RaggedLayer], settings: Settings, rows: int | None, given: Sequence[Tensor | None]
) -> list[EvictionPlan]:
    policy = settings.policy
    rows_now = [sum(each) for each in zip(*(layer.row_counts for layer in layers), strict=True)]
    wanted = [sum(each) for each in zip(*(_wanted(layer, settings, rows) for layer in layers), strict=True)]
    totals = list(map(min, rows_now, wanted))
    if totals == rows_now:
        return [EvictionPlan(None, None, layer.row_counts) for layer in layers]
    if len({layer.heads for layer in layers}) > 1:
        raise ValueError(
            "lkv.Cache: expected layers of the same number of KV heads for a policy of scope 'model', got "
            f"{[layer.heads for layer in layers]}"
        )
    scores, lengths, starts = [], [], None
    for layer, known in zip(layers, given, strict=True):
        score, observed = _score(layer, policy, known)
        scores.append(score)
        lengths.append(observed.lengths)
        starts = observed.starts  # the same for all: padding while rows are whole, then 0
    stacked = torch.stack([each.to(lengths[0].device) for each in lengths])
    budgets = policy.budgets(scores, stacked, torch.tensor(totals), starts=starts)
    check_budgets(policy, budgets, stacked.shape)
    budgets = budgets.clamp(min=0).minimum(stacked.to(budgets.device))
    counts = budgets.sum(2).tolist()  # what a layer is left with is the policy's choice: a synchronisation on CUDA
    ends = policy.sink, policy.window
    return [EvictionPlan(s, b, n, *ends) for s, b, n in zip(scores, budgets.unbind(0), counts, strict=True)]
