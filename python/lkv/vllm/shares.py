"""What every head of a layer keeps of a prompt, from its length alone: scheduler and workers compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lkv import policies
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import load
from lkv.vllm.settings import Settings

STEP = 64  # multiples of the retention are whole numbers of 1 / STEP: a few bytes of a spec that is compared


def of_model(settings: Settings, config: Any, layers: int, heads: int, ranks: int = 1) -> list[tuple[float, ...]]:
    """The shares of the settings, or of the checkpoint that is their policy, for the heads of one rank.

    A block of a request has the same number on every rank, and holds rows of another head there: heads that share the
    number of a block keep the same.

    Args:
        config: of the model, of transformers. layers, heads: layers and KV heads that it has. ranks: that the heads of
            every layer are shared out among.

    Returns:
        As `multiples`, of `heads / ranks` heads.

    Raises:
        ValueError: for shares of another shape than the model's, shares that differ between ranks, and as `multiples`
            does.
    """
    rows = _of_heads(settings, config, layers, heads)
    if ranks == 1 or settings.counts != "head":
        return rows
    local = heads // ranks
    for row in rows:
        parts = [row[i : i + local] for i in range(0, heads, local)]
        if any(part != parts[0] for part in parts):
            raise ValueError(
                f"lkv.vllm: expected shares of heads that are the same on each of {ranks} ranks, got {list(row)} in a "
                "layer: set counts to 'equal' or 'layer', or remove --tensor-parallel-size"
            )
    return [row[:local] for row in rows]


def _of_heads(settings: Settings, config: Any, layers: int, heads: int) -> list[tuple[float, ...]]:
    if settings.shares is None:
        learned, model = None, cast(PreTrainedModel, SimpleNamespace(config=config, device="cpu"))
        if settings.counts != "equal" and settings.policy not in policies.names():
            learned = load(settings.policy, model, any_weights=True)
        return multiples(learned, settings.retention, settings.counts, layers, heads)
    count = heads if settings.counts == "head" else 1
    got = [len(row) for row in settings.shares]
    if got != [count] * layers:
        raise ValueError(
            f"lkv.vllm: expected shares of {layers} layers, {count} for each with counts '{settings.counts}', got {got}"
        )
    return list(settings.shares)


def multiples(
    learned: Learned | None, retention: float, counts: str, layers: int, heads: int, classes: int = 4
) -> list[tuple[float, ...]]:
    """Shares of the heads of every layer, as multiples of the retention; their mean is 1, to the rounding.

    An engine has a pool for every class of layers, and pads classes to the same number of layers: so classes are of
    the same size, or differ by one layer where nothing else is possible. Layers of a class keep what they keep on
    average, head by head.

    Args:
        learned: the checkpoint; None: a policy without shares.
        retention: of the engine. counts: "equal": 1 for every layer; "layer": a number for every layer; "head": one for
            each head of it.
        layers, heads: of the model. classes: at most.

    Returns:
        For every layer one number, or `heads` of them.

    Raises:
        ValueError: for counts that are not equal without shares that are known before the text is.
    """
    if counts == "equal":
        return [(1.0,)] * layers
    if learned is None:
        raise ValueError(
            f"lkv.vllm: expected counts 'equal' with a policy that has no shares of its own, got {counts!r}: give the "
            "folder of a checkpoint of LKV as the policy"
        )
    if not learned.budget.static:
        raise ValueError(
            f"lkv.vllm: expected counts 'equal' with a checkpoint whose budgets depend on the text (kind 'threshold'), "
            f"got {counts!r}: train one with lkv train --budget capped"
        )
    with torch.no_grad():
        shares = learned.budget(retention).cpu()  # [N, H]
    if shares.shape != (layers, heads):
        raise ValueError(f"lkv.vllm: expected shares of a model of {[layers, heads]}, got {list(shares.shape)}")
    if counts == "layer":
        shares = shares.mean(1, keepdim=True)
    order = sorted(range(layers), key=lambda i: (float(shares[i].mean()), i))
    found: list[tuple[float, ...]] = [()] * layers
    for members in _classes(order, classes):
        mean = shares[members].mean(0) / retention
        each = tuple(max(1, round(STEP * float(x))) / STEP for x in mean)
        for layer in members:
            found[layer] = each
    return found


def _classes(order: Sequence[int], classes: int) -> list[list[int]]:
    """Layers in that order, cut into runs of the same length; into as many as can be, at most `classes`."""
    count = max(d for d in range(1, classes + 1) if len(order) % d == 0)
    if count == 1:
        count = min(classes, len(order))
    cuts = [round(i * len(order) / count) for i in range(count + 1)]
    return [list(order[a:b]) for a, b in pairwise(cuts)]
