"""Which rows a policy keeps of one text: scores, budgets, then the best rows of every head.

A policy is a dict: `policy`, the name of its class in `lkv.policies`, its settings, and where it wraps another one,
that one as `scorer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from lkv.reference.budgets import budgets_from_scores
from lkv.reference.policies import layers as divide
from lkv.reference.policies import scores as of
from lkv.reference.policies.transformer import Layer, read
from lkv.reference.select import select_row

Settings = Mapping[str, Any]
Kept = list[list[list[int]]]  # positions of every head of every layer, ascending


@dataclass(frozen=True)
class Text:
    """A text and the model that reads it.

    Attributes:
        config, weights: as of transformers. layers: how they read it.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    tokens: list[int]
    layers: list[Layer]

    @property
    def length(self) -> int:
        return len(self.tokens)


def text_of(config: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: list[int]) -> Text:
    return Text(config, weights, tokens, read(config, weights, tokens))


def kept(policy: Settings, text: Text, rows: int, changed: Callable[[Tensor], Tensor] = lambda scores: scores) -> Kept:
    """
    Args:
        rows: of a head, on average over all heads.
        changed: what is made of scores before rows are compared by them, to see what depends on it.
    """
    found = [changed(s) for s in scores(policy, text, rows)]
    counts = budgets(policy, text, found, rows)
    sink, window = ends(policy)
    out: Kept = []
    for layer, s, of_heads in zip(text.layers, found, counts, strict=True):
        chosen = changed(refined(policy, layer, s, of_heads))
        each = zip(chosen, of_heads, strict=True)
        out.append([select_row(x, n, start=0, length=text.length, sink=sink, window=window).tolist() for x, n in each])
    return out


def ends(policy: Settings) -> tuple[int, int]:
    """The first and last rows of a head that stay."""
    own = {"SAGEKV": (0, 1), "StreamingLLM": (policy.get("sink", 0), 0)}
    if policy["policy"] in own:
        return own[policy["policy"]]
    inner = ends(policy["scorer"]) if "scorer" in policy else (0, 0)
    return policy.get("sink", inner[0]), policy.get("window", inner[1])


def scores(policy: Settings, text: Text, rows: int) -> list[Tensor]:
    """`[H, n]` of every layer."""
    name, settings = policy["policy"], {k: v for k, v in policy.items() if k not in ("policy", "scorer")}
    if name == "KVzip":
        return repeated(text, **settings)
    inner = scores(policy["scorer"], text, rows) if "scorer" in policy else [torch.empty(0)] * len(text.layers)
    window = ends(policy)[1]
    if name in ("SnapKV", "CAKEScore", "DefensiveScore", "RKV"):
        del settings["sink"]  # protected, and no part of the score
    make: dict[str, Callable[[int, Layer, Tensor], Tensor]] = {
        "Random": lambda n, layer, _: of.random(layer, n, settings["seed"]),
        "SnapKV": lambda n, layer, _: of.snapkv(layer, **settings),
        "StreamingLLM": lambda n, layer, _: of.streaming_llm(layer),
        "DuoAttention": lambda n, layer, _: of.streaming_llm(layer),
        "H2O": lambda n, layer, _: of.h2o(layer, **settings),
        "TOVA": lambda n, layer, _: of.tova(layer),
        "SAGEKV": lambda n, layer, _: of.sage(layer, settings["group"]),
        "KNorm": lambda n, layer, _: of.knorm(layer),
        "KeyDiff": lambda n, layer, _: of.keydiff(layer),
        "LagKV": lambda n, layer, _: of.lagkv(layer, **settings),
        "RKV": lambda n, layer, _: of.rkv(layer, **settings),
        "CAKEScore": lambda n, layer, _: of.cake(layer, **settings),
        "DefensiveScore": lambda n, layer, _: of.defensive(layer, **settings, budget=rows),
        "ExpectedAttention": lambda n, layer, _: of.expected_attention(layer, **settings),
        "Leverage": lambda n, layer, _: of.leverage(layer, **settings),
        "Compactor": lambda n, layer, _: of.compactor(layer, **settings, budget=rows),
        "CAOTE": lambda n, layer, base: of.caote(layer, base),
        "FastCAOTE": lambda n, layer, base: of.caote(layer, base, fast=True),
        "LAVaScore": lambda n, layer, base: of.lava(layer, base, window, settings["before"]),
    }
    if name not in make:
        return inner  # a rule of budgets, or protection
    return [make[name](n, layer, base) for n, (layer, base) in enumerate(zip(text.layers, inner, strict=True))]


def budgets(policy: Settings, text: Text, found: list[Tensor], rows: int) -> list[list[int]]:
    """Rows of every head of every layer."""
    name, (count, heads), length = policy["policy"], (len(found), len(found[0])), text.length
    sure = sum(ends(policy))
    if name == "AcrossLayers" or (name == "KVzip" and policy["across"] == "layers"):
        flat = _competing(policy, [head for s in found for head in s], rows * count * heads, length)
        return [flat[i : i + heads] for i in range(0, len(flat), heads)]
    if name == "HeadKV":
        return divide.headkv(policy["table"], rows, length, sure, policy["beta"])
    if name == "DuoAttention":
        return divide.duo(policy["table"], rows, length, policy["sink"] + policy["recent"])
    totals = [rows * heads] * count
    if name == "PyramidKV":
        totals = [heads * n for n in divide.pyramid(count, rows, length, sure, policy["beta"])]
    elif name == "LAVa":
        shares = [divide.entropy(s, length - sure) for s in found]
        totals = divide.lava(shares, sum(totals), length, heads, sure)
    elif name == "CAKE":
        shares = [divide.preference(layer, sure, policy["tau1"], policy["tau2"]) for layer in text.layers]
        totals = [heads * (sure + n) for n in divide.cake(shares, count * (rows - sure), length - sure)]
    elif name == "SqueezeAttention":
        cosines = [layer.cosine for layer in text.layers]
        totals = divide.squeeze(cosines, sum(totals), length, heads, sure, policy["p"])
    won = [of_heads(policy, s, total, length) for s, total in zip(found, totals, strict=True)]
    if policy.get("code"):
        flat = divide.lava_code([n for row in won for n in row], rows, sure, length)
        return [flat[i : i + heads] for i in range(0, len(flat), heads)]
    return won


def of_heads(policy: Settings, found: Tensor, total: int, length: int) -> list[int]:
    """Rows of the heads of one layer, of its total."""
    if policy["policy"] == "AdaKV" or policy.get("across") == "heads":
        return _competing(policy, list(found), total, length)
    if "scorer" in policy:
        return of_heads(policy["scorer"], found, total, length)
    even, left = divmod(total, len(found))
    return [even + (h < left) for h in range(len(found))]


def _competing(policy: Settings, heads: list[Tensor], total: int, length: int) -> list[int]:
    sink, window = ends(policy)
    floor: dict[str, Any] = {}
    if policy.get("floor") == "blend":
        floor = {"blend": Fraction(str(policy["alpha"]))}
    elif policy.get("floor") == "minimum":
        floor = {"minimum": int(Fraction(str(policy["alpha"])) * total / len(heads))}
    ranges = [(0, length)] * len(heads)
    return budgets_from_scores(heads, total, ranges=ranges, sink=sink, window=window, **floor)


def refined(policy: Settings, layer: Layer, found: Tensor, counts: list[int]) -> Tensor:
    """The scores by which rows are chosen, where they depend on the budgets."""
    name, out, length = policy["policy"], found.clone(), layer.length
    if name not in ("CriticalKV", "SAGEKV", "H2O"):
        return refined(policy["scorer"], layer, found, counts) if "scorer" in policy else found
    sink, window = ends(policy)
    for h, n in enumerate(counts):
        if name == "H2O":  # the last rows and the heaviest
            out[h, length - int(n * policy["recent"]) :] = torch.inf
        elif name == "SAGEKV":
            end = int(n * policy["ends"])
            if policy["group"] == "union":  # the best rows of every query head in turn
                weights = layer.attention[h, :, -1, end : length - end]
                places = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
                out[h, end : length - end] = -places.amin(0).double()
            out[h, :end] = out[h, length - end :] = torch.inf
        else:
            first = max(int(n * policy["first"]) - sink - window, 0)
            between = slice(sink, length - window)
            best = found[h, between].argsort(descending=True, stable=True)[:first] + sink
            out[h] = (found[h] + policy["epsilon"]) * of.projected(layer)[h]
            out[h, best] = torch.inf
    return out


def repeated(
    text: Text, chunk: int, lead: int, repeated_sink: int, sink: int = 0, across: str | None = None
) -> list[Tensor]:
    """KVzip: the most attention that a row receives while its chunk of the text is repeated behind the text.

    Args:
        lead: tokens before a chunk that come before its repetition. repeated_sink: first rows in every softmax.
    """
    length = text.length
    found = [torch.zeros(layer.keys.shape[:2]).double() for layer in text.layers]
    for first in range(0, length, chunk):
        end = min(first + chunk, length)
        more = text.tokens[max(first - lead, 0) : end]
        seen = torch.zeros(length + len(more)).bool()
        seen[: min(repeated_sink, first)] = seen[first:end] = seen[length:] = True
        for layer, scores in zip(read(text.config, text.weights, text.tokens + more), found, strict=True):
            weights = layer.logits[:, :, length:].masked_fill(~seen, -torch.inf).softmax(-1)
            scores[:, first:end] = weights[..., first:end].amax((1, 2))
    return found
