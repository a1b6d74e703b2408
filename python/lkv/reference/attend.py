"""Attention over ragged rows."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of every query head over the rows of its KV head, in float64.

    Args:
        q: `[B, Hq, n, D]`.
        k, v: `[T, D]` and `[T, Dv]`; those of (b, h) are the `lengths[b, h]` from `cu_seqlens[b * H + h]` on.
        causal: query i sees all rows but the last n - 1 - i.
        sinks: `[Hq]`, a logit per query head that only enlarges the denominator of the softmax.

    Returns:
        float64 `[B, Hq, n, Dv]`; zeros for a query that sees nothing.
    """
    batch, query_heads, n, dim = q.shape
    heads = lengths.shape[1]
    out = torch.zeros(batch, query_heads, n, v.shape[1], dtype=torch.float64, device=q.device)
    for b in range(batch):
        for head in range(query_heads):
            h = head * heads // query_heads
            begin, length = int(cu_seqlens[b * heads + h]), int(lengths[b, h])
            rows = slice(begin, begin + length)
            for i in range(n):
                seen = max(0, length - (n - 1 - i)) if causal else length
                if seen == 0:
                    continue
                logits = k[rows][:seen].double() @ q[b, head, i].double() * (dim**-0.5 if scale is None else scale)
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                highest = logits.max()
                weights = (logits - highest).exp()
                total = weights.sum()
                if sinks is not None:
                    total += (sinks[head] - highest).exp()
                out[b, head, i] = weights / total @ v[rows][:seen].double()
    return out
