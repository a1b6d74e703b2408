"""What is kept of the layers of a cache, from what was observed of them and the settings. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lkv.hf.observation import ObservedLayer, observe
from lkv.hf.settings import Settings
from lkv.policies import Ahead, Carried, Layered, Observation, Policy, Weighs
from lkv.policies.base import accumulator, check_layers, refiner
from lkv_ext.shared import keeps_tensors

NOT_FOR_SCORES = frozenset({"output_projection", "attention_cosine"})  # needed where scores are given, too

L = TypeVar("L", bound=ObservedLayer)


@dataclass
class EvictionPlan:
    """Rows by score.

    Attributes:
        scores: float `[B, H, L]`; None: all rows stay.
        budgets: int `[B, H]`; None with the scores.
        row_counts: per sequence, rows of all heads together that will be left.
        sink, window: the first and last rows of every head that stay whatever their scores.
        carried: what the policy of the layer has accumulated until now.
    """

    scores: Tensor | None
    budgets: Tensor | None
    row_counts: list[int]
    sink: int = 0
    window: int = 0
    carried: Carried | None = None


@keeps_tensors
def plan(
    layers: Sequence[ObservedLayer],
    settings: Settings,
    rows: int | None = None,
    scores: Sequence[Tensor] | None = None,
) -> list[EvictionPlan]:
    """A plan for each layer that brings every sequence to `rows` per head, or to the target of its logical length.

    With scope "layer" every layer has its own total, with "model" and "cascade" they share one.

    Args:
        rows: default: `Settings.target` of each sequence.
        scores: `[B, H, L]` for each layer, in the place of the policy's.

    Raises:
        ValueError: for scores and budgets of the policy that do not fit the rows.
    """
    given = [None] * len(layers) if scores is None else list(scores)
    if settings.policy.scope != "layer":
        return _plan_together(layers, settings, rows, given)
    return [_plan(layer, settings, rows, s) for layer, s in zip(layers, given, strict=True)]


@keeps_tensors
def without(layer: ObservedLayer, leaving: Tensor) -> EvictionPlan:
    """Evicts the rows of some tokens, which a mask has hidden: bool `[B, L]`, by position."""
    observed = observe(layer, frozenset(), 0)
    index = observed.positions.long().clamp(0, leaving.shape[1] - 1)
    leaves = leaving.to(index.device)[:, None].expand(*index.shape[:2], -1).gather(2, index)
    stays = observed.valid() & ~leaves
    budgets = stays.sum(2).cpu()
    return EvictionPlan(stays.float(), budgets, budgets.sum(1).tolist())


def _wanted(layer: ObservedLayer, settings: Settings, rows: int | None) -> list[int]:
    """Per sequence, rows that all heads of the layer shall keep."""
    wanted = [settings.target(count) if rows is None else rows for count in layer.token_counts]
    if isinstance(settings.policy, Layered):
        here, layers = layer.rank
        kept = torch.tensor(list(map(min, wanted, layer.token_counts)), device="cpu")
        table = settings.policy.layer_rows(layers, kept, torch.tensor(layer.token_counts, device="cpu"))
        check_budgets(settings.policy, table, [layers, len(wanted)], "[N, B]")
        wanted = table[here].tolist()
    return [layer.heads * count for count in wanted]


def score(
    layer: ObservedLayer, policy: Policy, given: Tensor | None, budget: list[int]
) -> tuple[Tensor, Observation, Carried | None]:
    """Scores of a layer, what they were made of, and what its own policy carries on.

    Args:
        budget: rows per head, on average, by sequence.
    """
    check_layers(policy, layer.rank[1])
    observed = observe(layer, policy.needs if given is None else policy.needs & NOT_FOR_SCORES, policy.window)
    if "budget" in policy.needs:
        observed = replace(observed, budget=torch.tensor(budget, device="cpu"))
    own, here = accumulator(layer.settings.policy), accumulator(policy) if given is None else None
    carried = None
    if own is not None:  # whoever evicts: the queries since the last eviction are there for the last time
        shown = observed if own == here else observe(layer, own.needs, layer.settings.policy.window)
        carried = own.accumulate(layer.rank[0], shown, layer.carried())
    if here is not None:
        observed = replace(observed, carried=carried if own == here else here.accumulate(layer.rank[0], observed, None))
    scores = policy.score(layer.rank[0], observed) if given is None else given
    _check_scores(policy, scores, observed)
    return scores, observed, None if carried is None else replace(carried, scores=None)


def _refine(layer: ObservedLayer, policy: Policy, observed: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
    """Scores by which rows are chosen, once the budgets are known."""
    chooses = refiner(policy)
    if chooses is None:
        return scores
    scores = chooses.refine(layer.rank[0], observed, scores, budgets.to(scores.device))
    _check_scores(policy, scores, observed)
    return scores


def one_total(policy: Policy) -> bool:
    """Whether all layers share what is kept, rather than each having its own total."""
    return policy.scope != "layer" or isinstance(policy, (Ahead, Layered))


def over_cap(layers: Sequence[L], policy: Policy, cap: int, count: int) -> list[L]:
    """The layers that `count` more tokens would take over the cap; all or none of them where they share one total."""
    groups = [list(layers)] if one_total(policy) else [[layer] for layer in layers]
    full = [group for group in groups if group and _rows_after(group, count) > cap * _heads(group)]
    return [layer for group in full for layer in group]


def _heads(layers: Sequence[ObservedLayer]) -> int:
    return sum(layer.heads for layer in layers)


def _rows_after(layers: Sequence[ObservedLayer], count: int) -> int:
    """Rows of the fullest sequence with `count` tokens more."""
    return max(map(sum, zip(*(layer.row_counts for layer in layers), strict=True))) + count * _heads(layers)


def _plan(layer: ObservedLayer, settings: Settings, rows: int | None, given: Tensor | None) -> EvictionPlan:
    policy = settings.policy
    if isinstance(policy, Ahead):
        return _plan_ahead(layer, settings, policy, rows, given)
    totals = list(map(min, layer.row_counts, _wanted(layer, settings, rows)))
    if totals == layer.row_counts:
        return EvictionPlan(None, None, totals)
    scores, observed, carried = score(layer, policy, given, [total // layer.heads for total in totals])
    budgets = policy.budgets(scores, observed.lengths, torch.tensor(totals, device="cpu"), starts=observed.starts)
    check_budgets(policy, budgets, observed.lengths.shape)
    budgets = budgets if budgets.is_cpu else _within(budgets, totals)
    scores = _refine(layer, policy, observed, scores, budgets)
    return EvictionPlan(scores, budgets, totals, policy.sink, policy.window, carried)


def _plan_ahead(
    layer: ObservedLayer, settings: Settings, ahead: Ahead, rows: int | None, given: Tensor | None
) -> EvictionPlan:
    policy, counts = settings.policy, layer.token_counts
    wanted = [min(n, settings.target(n) if rows is None else rows) for n in counts]
    if wanted == counts:
        return EvictionPlan(None, None, layer.row_counts)
    scores, observed, carried = score(layer, policy, given, wanted)
    kept, tokens = torch.tensor(wanted, device="cpu"), torch.tensor(counts, device="cpu")
    budgets = ahead.ahead(layer.rank[0], kept, tokens)
    check_budgets(policy, budgets, observed.lengths.shape)
    # Whole rows are as many as there are tokens; of packed ones only the device knows.
    there = tokens[:, None] if layer.rows is None else observed.lengths.cpu()
    budgets = budgets.clamp(min=0).minimum(there)
    scores = _refine(layer, policy, observed, scores, budgets)
    return EvictionPlan(scores, budgets, budgets.sum(1).tolist(), policy.sink, policy.window, carried)


def _within(budgets: Tensor, totals: list[int]) -> Tensor:
    """Budgets on a GPU, where nobody reads them, cut so that they do not pass the totals that memory is made for."""
    left = torch.tensor(totals, device=budgets.device)[:, None]
    budgets = budgets.clamp(min=0)
    return budgets.minimum((left + budgets - budgets.cumsum(1)).clamp(min=0))


def _plan_together(
    layers: Sequence[ObservedLayer], settings: Settings, rows: int | None, given: Sequence[Tensor | None]
) -> list[EvictionPlan]:
    policy = settings.policy
    rows_now = [sum(each) for each in zip(*(layer.row_counts for layer in layers), strict=True)]
    wanted = [sum(each) for each in zip(*(_wanted(layer, settings, rows) for layer in layers), strict=True)]
    totals = list(map(min, rows_now, wanted))
    if totals == rows_now:
        return [EvictionPlan(None, None, layer.row_counts) for layer in layers]
    check_heads(layers, policy)
    mean = [total // _heads(layers) for total in totals]
    scores, lengths, importance, carried, starts = [], [], [], [], None
    for layer, known in zip(layers, given, strict=True):
        found, observed, sums = score(layer, policy, known, mean)
        scores.append(found)
        carried.append(sums)
        lengths.append(observed.lengths)
        starts = observed.starts  # the same for all: padding while rows are whole, then 0
        if isinstance(policy, Weighs):
            importance.append(policy.importance(layer.rank[0], observed, found).to(lengths[0].device))
    stacked = torch.stack([each.to(lengths[0].device) for each in lengths])
    more: dict[str, Any] = {"importance": torch.stack(importance)} if importance else {}
    budgets = policy.budgets(scores, stacked, torch.tensor(totals, device="cpu"), starts=starts, **more)
    check_budgets(policy, budgets, stacked.shape)
    budgets = budgets.clamp(min=0).minimum(stacked.to(budgets.device))
    if refiner(policy) is not None:  # observed once more, as the rows of one layer at a time are in memory then
        each = zip(layers, scores, budgets.unbind(0), strict=True)
        scores = [_refine(x, policy, observe(x, policy.needs, policy.window), s, b) for x, s, b in each]
    counts = budgets.sum(2).tolist()  # what a layer is left with is the policy's choice: a synchronisation on CUDA
    ends, parts = (policy.sink, policy.window), (scores, budgets.unbind(0), counts, carried)
    return [EvictionPlan(s, b, n, *ends, sums) for s, b, n, sums in zip(*parts, strict=True)]


def _check_scores(policy: Policy, scores: Tensor, observed: Observation) -> None:
    """Raises ValueError for scores that are not one for every row that was observed."""
    expected = observed.keys.shape[:3]
    if not isinstance(scores, Tensor) or scores.shape != expected:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"lkv.Cache: expected scores of {policy} of shape [B, H, L] = {list(expected)}, got {got}")


def check_heads(layers: Sequence[ObservedLayer], policy: Policy) -> None:
    """Raises ValueError for layers that cannot share a total, as their heads are not as many."""
    if len({layer.heads for layer in layers}) > 1:
        raise ValueError(
            f"lkv.Cache: expected layers of the same number of KV heads for a policy of scope {policy.scope!r}, got "
            f"{[layer.heads for layer in layers]}"
        )


def check_budgets(policy: Policy, budgets: Tensor, expected: Sequence[int], form: str | None = None) -> None:
    """Raises ValueError for budgets of another shape than `[B, H]` (`[N, B, H]`), and for such as are not whole."""
    if not isinstance(budgets, Tensor) or list(budgets.shape) != list(expected) or budgets.is_floating_point():
        got = f"{budgets.dtype} {list(budgets.shape)}" if isinstance(budgets, Tensor) else type(budgets).__name__
        form = form or ("[B, H]" if len(expected) == 2 else "[N, B, H]")
        raise ValueError(f"lkv.Cache: expected whole budgets of {policy} of shape {form} = {list(expected)}, got {got}")
