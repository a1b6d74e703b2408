"""The attention of the queries that a policy is shown, by the settings of the model itself, and what is made of it.

Methods differ in the order in which they average over queries, pool along the rows and reduce the query heads of a KV
head. A maximum commutes with a maximum and a mean with a mean, but not one with the other: each step is a function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lkv.policies.protocol import Observation


def attention_logits(observation: Observation, head: int) -> tuple[Tensor, Tensor]:
    """float32 `[B, G, w, L]`, the logits of each query of the G query heads of one KV head, and what each query sees.

    That is bool `[B, w, L]`: nothing outside the valid rows, and nothing by queries that are not there.
    """
    keys = observation.keys[:, head]
    batch, length, dim = keys.shape
    queries = observation.part("queries")
    group = queries.shape[1] // observation.keys.shape[1]
    queries = queries[:, head * group : (head + 1) * group]
    count = queries.shape[2]

    logits = torch.bmm(queries.reshape(batch, group * count, dim), keys.transpose(1, 2)).float()
    logits = logits.mul_(observation.scaling).view(batch, group, count, length)
    if observation.softcap is not None:
        logits = logits.div_(observation.softcap).tanh_().mul_(observation.softcap)
    visible = observation.positions[:, head, None, :] <= observation.part("query_positions")[..., None]
    visible = visible & observation.valid()[:, head, None] & observation.part("query_mask")[..., None]
    return logits, visible


def attention_weights(observation: Observation, head: int) -> Tensor:
    """float32 `[B, G, w, L]`: what each query pays to the rows of one KV head, whose G query heads share it.

    Softmax over the rows that a query sees, and over the sink of its head where the model has sinks. Zeros for rows
    outside the valid ones, and for queries that are not there.
    """
    logits, visible = attention_logits(observation, head)
    batch, group, count, length = logits.shape
    # For a query that sees nothing a softmax would give NaN: such queries are masked out instead.
    logits.masked_fill_(~visible[:, None], torch.finfo(torch.float32).min)
    if observation.sinks is not None:
        sinks = observation.sinks[head * group : (head + 1) * group].float().view(1, group, 1, 1)
        logits = torch.cat([logits, sinks.expand(batch, group, count, 1)], -1)
    return logits.softmax(-1)[..., :length].mul_(visible[:, None])


def mean_attention(observation: Observation, head: int) -> Tensor:
    """float32 `[B, G, L]`: the mean attention that the queries pay to the rows of one KV head.

    Queries that are not there do not count; a sequence without any real query has zeros.
    """
    count = observation.part("query_mask").sum(1).clamp(min=1)
    return attention_weights(observation, head).sum(2) / count[:, None, None]


def evictable(observation: Observation, window: int, sink: int = 0) -> Tensor:
    """bool `[B, H, L]`: the valid rows that are neither in the sink nor in the window."""
    ranks = observation.ranks()
    return (ranks >= sink) & (ranks < (observation.lengths - window)[..., None])


def pooled(weights: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """`[B, G, L]`, none negative, pooled along the rows: "avg" or "max". Beyond the ends lie zeros, which count."""
    if kernel_size == 1:
        return weights
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d  # no weight is negative: zeros lose every max
    return pool(weights, kernel_size, stride=1, padding=kernel_size // 2)


def grouped(weights: Tensor, group: str) -> Tensor:
    """`[B, G, L]` of the query heads of a KV head to `[B, L]`: "mean" or "max"."""
    return weights.mean(1) if group == "mean" else weights.amax(1)


def blocks(observation: Observation, size: int = 256) -> Iterator[Observation]:
    """The same rows, with some of the queries at a time: for methods that look at all of them."""
    queries, places, mask = map(observation.part, ("queries", "query_positions", "query_mask"))
    for first in range(0, queries.shape[2], size):
        some = slice(first, first + size)
        yield replace(
            observation, queries=queries[:, :, some], query_positions=places[:, some], query_mask=mask[:, some]
        )
