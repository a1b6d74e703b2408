"""What every method says a row is worth, from its paper's formula: one text, float64, full matrices.

Each function takes a `Layer` and the settings of the method, and returns `[H, n]`, higher is kept. A row of the window
or of the sink is kept whatever it scores.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from lkv.reference.policies.transformer import Layer, rotated

Scores = Callable[..., Tensor]


def pooled(rows: list[float], size: int, kind: str) -> list[float]:
    """The mean, or the largest, of the `size` numbers around each; beyond the ends lie zeros."""
    half = size // 2
    padded = [0.0] * half + rows + [0.0] * half
    around = [padded[i : i + size] for i in range(len(rows))]
    return [sum(x) / size if kind == "avg" else max(x) for x in around]


def pool(weights: Tensor, size: int, kind: str) -> Tensor:
    """`[..., n]`, along the last axis."""
    rows = [pooled(row, size, kind) for row in weights.reshape(-1, weights.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(weights.shape)


def padded(before: Tensor, length: int) -> Tensor:
    """`[H, N]` of the rows before a window, with zeros for those of the window."""
    return torch.cat([before, before.new_zeros(len(before), length - before.shape[1])], 1)


def of_window(layer: Layer, window: int) -> Tensor:
    """`[H, G, w, N]`: attention of the last w queries to the rows before them."""
    return layer.attention[:, :, layer.length - window :, : layer.length - window]


def snapkv(
    layer: Layer, window: int, kernel_size: int, pooling: str = "avg", group: str = "mean", group_first: bool = False
) -> Tensor:
    def reduced(weights: Tensor) -> Tensor:
        return weights.mean(1) if group == "mean" else weights.amax(1)

    weights = of_window(layer, window).mean(2)
    if group_first:  # Ada-KV and LAVa
        return padded(pool(reduced(weights), kernel_size, pooling), layer.length)
    return padded(reduced(pool(weights, kernel_size, pooling)), layer.length)


def streaming_llm(layer: Layer, **_: object) -> Tensor:
    return torch.arange(layer.length).double().expand(len(layer.keys), -1)


def h2o(layer: Layer, average: bool = False, **_: object) -> Tensor:
    """What a row has received from all queries; on average over those that see it."""
    received = layer.attention.sum(2).mean(1)
    return received / torch.arange(layer.length, 0, -1) if average else received


def tova(layer: Layer, **_: object) -> Tensor:
    return layer.attention[:, :, -1].mean((0, 1)).expand(len(layer.keys), -1)


def sage(layer: Layer, group: str) -> Tensor:
    """Attention of the last query: the sum over the query heads, or the largest."""
    weights = layer.attention[:, :, -1]
    return weights.sum(1) if group == "sum" else weights.amax(1)


def knorm(layer: Layer, **_: object) -> Tensor:
    return -layer.keys.norm(dim=-1)


def keydiff(layer: Layer, **_: object) -> Tensor:
    directions = layer.keys / layer.keys.norm(dim=-1, keepdim=True)
    mean = directions.mean(1, keepdim=True)
    return -(directions * mean).sum(-1) / mean.norm(dim=-1)


def lagkv(layer: Layer, sink: int, lag: int, cross: bool = False) -> Tensor:
    scores = torch.ones(layer.keys.shape[:2]).double()
    pieces = (layer.length - sink) // lag
    bounds = [sink + i * lag for i in range(pieces + 1)]
    for h in range(len(scores)):
        for (first, end), (behind, last) in pairwise(pairwise(bounds)):
            found = torch.zeros(lag).double()
            for rows in (layer.keys[h], layer.values[h]):
                low, high = rows[behind:last].amin(0), rows[behind:last].amax(0)
                found += ((rows[first:end] - low) / (high - low)).std(-1).softmax(-1) / 2
            ranks = found.argsort().argsort() / lag
            scores[h, first:end] = found if cross else ranks
    return scores


def caote(layer: Layer, base: Tensor, fast: bool = False) -> Tensor:
    """`a / (1 - a) |o - v|`, a being the scores of another method, of sum 1."""
    a = base / base.sum(1, keepdim=True)
    output = layer.values.mean(1) if fast else (a[:, :, None] * layer.values).sum(1)
    return a / (1 - a) * (output[:, None] - layer.values).norm(dim=-1)


def lava(layer: Layer, base: Tensor, window: int, before: bool = False) -> Tensor:
    values = layer.values[:, : layer.length - window] if before else layer.values
    return base * values.abs().sum(-1).amax(1)[:, None]


def rkv(layer: Layer, window: int, kernel_size: int, mix: float, threshold: float) -> Tensor:
    end = layer.length - window
    logits = layer.logits[:, :, end:, :end].amax(1)
    attention = padded(pool(logits.softmax(-1).mean(1), kernel_size, "max"), layer.length)
    redundancy = torch.empty_like(attention)
    for h, keys in enumerate(layer.keys):
        directions = keys / keys.norm(dim=-1, keepdim=True)
        cosines = (directions @ directions.T).fill_diagonal_(0)
        for row in cosines:  # the last one like it is spared
            like = (row > threshold).nonzero()
            row[int(like[-1]) if len(like) else 0] = 0
        redundancy[h] = (cosines.sum(0) / layer.length).softmax(-1)
    return mix * attention - (1 - mix) * redundancy


def cake(layer: Layer, window: int, kernel_size: int, gamma: float) -> Tensor:
    weights = of_window(layer, window)
    return padded(
        pool(weights.mean(2) + gamma * weights.var(2), kernel_size, "avg").mean(1),
        layer.length,
    )


def defensive(layer: Layer, window: int, kernel_size: int, budget: int, sure: bool) -> Tensor:
    """The worst case over the queries of the window, times the share of a head in the norms of projected values."""
    weights, end = of_window(layer, window), layer.length - window
    smooth = pool(weights, kernel_size, "avg")
    smooth = smooth / smooth.sum(-1, keepdim=True) * weights.sum(-1, keepdim=True)
    worst = smooth.amax((1, 2))
    worst = torch.maximum(worst, worst.mean(1, keepdim=True))
    norms = projected(layer)
    scores = worst * (norms / norms.sum(0))[:, :end]
    mean = weights.mean((1, 2))
    threshold = 0.9 - mean[:, end - window :].sum(1).mean()  # less what lies just before the window
    best = scores.max()
    for h, row in enumerate(mean):  # the rows that make up most of the attention come first
        order = row.argsort(descending=True, stable=True)
        reached = (row[order].cumsum(0) / row.sum() >= threshold).nonzero()
        count = min(int(reached[0]) if len(reached) else 0, max(budget - window, 0))
        scores[h, order[:count]] = torch.inf if sure else best
    return padded(scores, layer.length)


def projected(layer: Layer) -> Tensor:
    """`[H, n]`: L1 norm of a value behind the output projection, mean over the query heads."""
    return torch.einsum("hnd,hgxd->hgnx", layer.values, layer.output).abs().sum(-1).mean(1)


def expected_attention(
    layer: Layer, future: int, sink: int, covariance: bool = True, norms: bool = True, epsilon: float = 0.0
) -> Tensor:
    """Attention of normal queries with the moments of those of the text, by the mean rotation of the next positions."""
    queries = layer.queries_before[:, :, sink:]
    mean = queries.mean(2)
    centred = queries - mean[:, :, None]
    spread = centred.transpose(-1, -2) @ centred / centred.shape[2]
    dim = mean.shape[-1]
    turns = rotated(torch.eye(dim).double()[:, None].expand(-1, future, -1), layer.frequencies, layer.length)
    turn = turns.mean(1).T  # the mean rotation, as a matrix on columns
    mean, spread = mean @ turn.T, turn @ spread @ turn.T
    keys = layer.keys[:, None, sink:]
    logits = (keys @ mean[..., None])[..., 0] * layer.scaling
    if covariance:
        logits = logits + ((keys @ spread) * keys).sum(-1) * layer.scaling**2 / 2
    scores = logits.softmax(-1).mean(1) + epsilon
    if norms:
        scores = scores * layer.values[:, sink:].norm(dim=-1)
    return torch.cat([scores.new_zeros(len(scores), sink), scores], 1)


def leverage(layer: Layer, sink: int, window: int, ridge: float) -> Tensor:
    rows = layer.keys_before[:, sink : layer.length - window]
    rows = rows - rows.mean(1, keepdim=True)
    inverse = torch.linalg.inv(rows.transpose(1, 2) @ rows + ridge * torch.eye(rows.shape[-1]).double())
    return between((rows @ inverse * rows).sum(-1), sink, window)


def compactor(
    layer: Layer, sink: int, window: int, ridge: float, piece: int, blending: float | None, budget: int
) -> Tensor:
    """Leverage, and attention without a mask within pieces of the text."""
    blend = 1 - budget / layer.length if blending is None else blending
    end = layer.length - window
    received = torch.zeros(layer.keys.shape[:2]).double()
    for first in range(sink, end, piece):
        here = slice(first, min(first + piece, end))
        logits = layer.queries[:, :, here] @ layer.keys[:, None, here].transpose(-1, -2)
        received[:, here] = logits.softmax(-1).sum(2).mean(1)
    scores = pool(received * layer.values.norm(dim=-1), 3, "avg")[:, sink:end]
    return blend * leverage(layer, sink, window, ridge) + between(scores, sink, window)


def between(scores: Tensor, sink: int, window: int) -> Tensor:
    """Scores of the rows between the ends, of mean 0 and deviation 1 over the layer; 0 at the ends."""
    scores = (scores - scores.mean()) / scores.std()
    ends = [scores.new_zeros(len(scores), n) for n in (sink, window)]
    return torch.cat([ends[0], scores, ends[1]], 1)


def random(layer: Layer, index: int, seed: int) -> Tensor:
    """A 32-bit hash of position, seed, layer and head, over 2^32."""
    scores = torch.empty(layer.keys.shape[:2]).double()
    for h, row in enumerate(scores):
        for n in range(len(row)):
            state = n * 0x9E3779B1 + (seed * 4096 + index) * 256 + h
            for multiplier in (0x7FEB352D, 0x846CA68B):
                state = ((state ^ (state >> 16)) * multiplier) & 0xFFFFFFFF
            row[n] = (state ^ (state >> 16)) / 2**32
    return scores
