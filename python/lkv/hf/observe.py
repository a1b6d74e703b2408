"""What a policy is shown of one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lkv.policies import Observation, Policy

if TYPE_CHECKING:
    from lkv.hf.layer import RaggedLayer


def observe(layer: RaggedLayer, policy: Policy) -> Observation:
    """The rows of a layer, whole or packed, and what the policy needs beside them."""
    if layer.rows is None:
        keys, values = layer.keys, layer.values
        batch, heads, length = keys.shape[:3]
        lengths = torch.tensor(layer.real, device=keys.device)[:, None].expand(batch, heads)
        starts = length - lengths
        positions = torch.arange(length, device=keys.device).expand(batch, heads, length)
    else:
        rows = layer.rows
        keys, values, positions = map(rows.padded, (rows.k, rows.v, rows.positions))
        lengths = rows.lengths.long()
        starts = torch.zeros_like(lengths)
    queries = (None, None, None)
    if "queries" in policy.needs:
        queries = layer.queries.read(max(policy.window, 1))
    return Observation(keys, values, positions, lengths, starts, *queries, layer.scaling, layer.softcap)
