"""The second pass of KVzip (arXiv 2505.23416): the model is made to repeat a text that it has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """Scores of a policy that needs "second_pass": float32 `[B, H, n]` per layer, 0 in padding.

    Args:
        context: what was read.
        tokens: `[B, n]`, what it was read from, padded on the right with anything.
        prompt: tokens that ask for the repetition; a model that goes on with what it has seen needs none.

    Raises:
        ValueError: for tokens of another shape, and a model that does not attend to all in every layer.
    """
    batch, heads, size, _ = context.keys[0].shape
    if tokens.shape != (batch, size):
        raise ValueError(f"lkv.learn: expected tokens of shape [B, n] = {[batch, size]}, got {list(tokens.shape)}")
    best = [keys.new_zeros(batch, heads, size, dtype=torch.float32) for keys in context.keys]
    instruction = torch.tensor(prompt, dtype=tokens.dtype, device=tokens.device).expand(batch, -1)
    for begin in range(0, size, CHUNK):
        first = max(begin - LEAD, 0)
        chunk = torch.cat([instruction, tokens[:, first : begin + CHUNK]], 1)
        # A text that has ended before has no queries, not even those of the instruction.
        asking = torch.where(context.lengths > begin, len(prompt) + context.lengths - first, 0)

        def watch(layer: int, query: Tensor, keys: Tensor, *settings: Any, asking: Tensor = asking) -> None:
            scores = policy.score(layer, _observe(context, asking, query, keys, *settings))
            torch.maximum(best[layer], scores[..., :size], out=best[layer])

        follow(model, context, chunk, watch=watch)
    return best


def _observe(
    context: Context,
    asking: Tensor,
    query: Tensor,
    keys: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Observation:
    """The rows of the context and of the pass itself, of which a query sees those up to its own.

    Args:
        asking: int `[B]`, how many of the queries are of the text: the first ones.
    """
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
        query_mask=torch.arange(count, device=device) < asking[:, None],
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
    )
