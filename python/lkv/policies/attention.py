"""The attention of the queries that a policy is shown, by the settings of the model itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lkv.policies.protocol import Observation


def attention_weights(observation: Observation, head: int) -> Tensor:
    """float32 `[B, G, w, L]`: what each query pays to the rows of one KV head, whose G query heads share it.

    Softmax over the rows that a query sees, and over the sink of its head where the model has sinks. Zeros for rows
    outside the valid ones, and for queries that are not there.
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
    # For a query that sees nothing a softmax would give NaN: such queries are masked out instead.
    logits.masked_fill_(~visible[:, None], torch.finfo(torch.float32).min)
    if observation.sinks is not None:
        sinks = observation.sinks[head * group : (head + 1) * group].float().view(1, group, 1, 1)
        logits = torch.cat([logits, sinks.expand(batch, group, count, 1)], -1)
    return logits.softmax(-1)[..., :length].mul_(visible[:, None])
