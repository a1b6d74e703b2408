"""The second pass of KVzip (arXiv 2505.23416): the model is made to repeat a text that it has read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lkv.learn.passes import Context, follow
from lkv.policies import Observation, Policy

CHUNK = 512  # tokens repeated at a time
LEAD = 8  # tokens before a chunk that tell the model where it is


@torch.no_grad()
def repeat_scores(
    model: PreTrainedModel, context: Context, tokens: Tensor, policy: Policy, *, prompt: Sequence[int] = ()
) -> list[Tensor]:
    """Scores of a policy that needs "second_pass": float32 `[B, H, n]` per layer.

    Args:
        context: what was read.
        tokens: `[B, n]`, what it was read from, padded on the right.
        prompt: tokens that ask for the repetition; a model that goes on with what it has seen needs none.
    """
    batch, heads, size, _ = context.keys[0].shape
    best = [keys.new_zeros(batch, heads, size, dtype=torch.float32) for keys in context.keys]
    asked = torch.tensor(prompt, dtype=tokens.dtype, device=tokens.device).expand(batch, -1)
    for begin in range(0, size, CHUNK):
        chunk = torch.cat([asked, tokens[:, max(begin - LEAD, 0) : begin + CHUNK]], 1)

        def watch(layer: int, query: Tensor, keys: Tensor, scaling: float, softcap: float | None) -> None:
            scores = policy.score(layer, _observe(context, layer, query, keys, scaling, softcap))
            torch.maximum(best[layer], scores[..., :size], out=best[layer])

        follow(model, context, chunk, watch=watch)
    return best


def _observe(
    context: Context, layer: int, query: Tensor, keys: Tensor, scaling: float, softcap: float | None
) -> Observation:
    """The rows of the context and of the pass itself, of which a query sees those up to its own."""
    batch, heads, length, _ = keys.shape
    count, device = query.shape[2], keys.device
    places = torch.arange(length, device=device).expand(batch, length)
    # Rows in the padding of a context come later than all queries.
    places = torch.where((places >= context.lengths[:, None]) & (places < context.size), length, places)
    return Observation(
        keys=keys,
        values=keys,
        positions=places[:, None].expand(batch, heads, length),
        lengths=torch.full((batch, heads), length, device=device),
        starts=torch.zeros(batch, heads, dtype=torch.int64, device=device),
        queries=query,
        query_positions=torch.arange(length - count, length, device=device).expand(batch, count),
        query_mask=torch.ones(batch, count, dtype=torch.bool, device=device),
        scaling=scaling,
        softcap=softcap,
    )
