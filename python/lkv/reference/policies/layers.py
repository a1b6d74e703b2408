"""How methods divide a total among layers and heads: one text of n tokens, exact fractions, whole numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

from torch import Tensor

from lkv.reference.budgets import apportion, budgets_from_shares
from lkv.reference.policies.scores import of_window
from lkv.reference.policies.transformer import Layer


def pyramid(layers: int, rows: int, length: int, ends: int, beta: float) -> list[int]:
    """Rows of a head of each layer, in equal steps. ends: protected rows of a head."""
    base, there = rows - ends, length - ends
    least = base / Fraction(beta)
    most = 2 * base - least
    if most >= there:
        most, least = Fraction(there), Fraction(2 * base - there)
    if length < 2 * base or least < 0:
        return [rows] * layers
    steps = [most - n * (most - least) / (layers - 1) for n in range(layers)]
    upper = [there] * layers
    return [ends + n for n in apportion(steps, layers * base, [0] * layers, upper)]


def entropy(scores: Tensor, end: int) -> float:
    """LAVa: of the scores of a layer before the window, over their number."""
    share = scores[:, :end] / scores[:, :end].sum()
    return float(-(share * share.log()).nan_to_num(0).sum() / share.numel())


def lava(shares: Sequence[float], total: int, length: int, heads: int, ends: int) -> list[int]:
    """Rows of all heads of each layer, by the shares beside the window."""
    layers, sure = len(shares), heads * ends
    rest = budgets_from_shares(shares, total - layers * sure, [heads * (length - ends)] * layers)
    return [sure + n for n in rest]


def lava_code(won: Sequence[int], mean: int, ends: int, length: int) -> list[int]:
    """What heads that won so many rows, window included, get in the authors' code, brought to the same total."""
    wishes = [Fraction(round(0.8 * (n - ends) + int(0.2 * mean))) for n in won]
    rest = apportion(wishes, sum(won) - ends * len(won), [0] * len(won), [length - ends] * len(won))
    return [ends + n for n in rest]


def preference(layer: Layer, window: int, tau1: float, tau2: float) -> float:
    """CAKE: how spread the attention of the window is, and how much it changes."""
    weights = of_window(layer, window)
    spread = -(weights * weights.log()).nan_to_num(0).sum()
    return float(spread ** (1 / tau1) * weights.var(2).sum() ** (1 / tau2))


def cake(preferences: Sequence[float], total: int, cap: int) -> list[int]:
    """Rows of a head of each layer beside the window: whole shares, then what is over or left, evenly."""
    shares = [int(p / sum(preferences) * total) for p in preferences]
    rows = [min(n, cap) for n in shares]
    for target in (sum(shares), total):
        while sum(rows) < target:
            free = [n for n, count in enumerate(rows) if count < cap]
            even, left = divmod(target - sum(rows), len(free))
            for i, n in enumerate(free):
                rows[n] = min(rows[n] + even + (i < left), cap)
    return rows


def squeeze(cosines: Sequence[float], total: int, length: int, heads: int, ends: int, p: float) -> list[int]:
    """SqueezeAttention: the layers of the highest of three groups keep p of the mean, the others the rest."""
    order = sorted(range(len(cosines)), key=lambda n: cosines[n])

    def distance(part: Sequence[int]) -> float:
        mean = sum(cosines[n] for n in part) / len(part)
        return math.fsum((cosines[n] - mean) ** 2 for n in part)

    def groups(splits: tuple[int, int]) -> list[list[int]]:
        return [order[: splits[0]], order[splits[0] : splits[1]], order[splits[1] :]]

    best = min(combinations(range(1, len(order)), 2), key=lambda at: sum(map(distance, groups(at))))
    low = set(groups(best)[2])
    share = Fraction(str(p))
    other = (len(order) - len(low) * share) / (len(order) - len(low))
    wishes = [share if n in low else other for n in range(len(order))]
    floor = min(heads * ends, total // len(order))
    return apportion(wishes, total, [floor] * len(order), [heads * length] * len(order))


def headkv(table: Sequence[Sequence[float]], rows: int, length: int, ends: int, beta: float) -> list[list[int]]:
    """Rows of every head: an equal part, and its share of a pool."""
    flat = [Fraction(str(x)) for row in table for x in row]
    base = rows - ends
    pool = int(base // beta)
    wishes = [x / sum(flat) * pool * len(flat) + base - pool for x in flat]
    found = apportion(wishes, base * len(flat), [0] * len(flat), [length - ends] * len(flat))
    heads = len(table[0])
    return [[ends + n for n in found[i : i + heads]] for i in range(0, len(found), heads)]


def duo(table: Sequence[Sequence[float]], rows: int, length: int, streaming: int) -> list[list[int]]:
    """Rows of every head: as many of the best as the total pays for keep everything."""
    flat = [x for row in table for x in row]
    streaming = min(streaming, rows, length)
    found, left = [streaming] * len(flat), (rows - streaming) * len(flat)
    for n in sorted(range(len(flat)), key=lambda n: -flat[n]):
        more = min(left, length - streaming)
        found[n], left = found[n] + more, left - more
    heads = len(table[0])
    return [found[i : i + heads] for i in range(0, len(found), heads)]
