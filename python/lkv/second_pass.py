"""The second pass of KVzip (arXiv 2505.23416): the model is made to repeat a text that it has read.

A row is worth the most attention that any token of the repetition pays to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.hf.attention import Logits
from lkv.passes import Context, follow, visible
from lkv.policies import Policy
from lkv.policies.kvzip import KVzip, Repetition
from lkv.text import chat_frame

BLOCK = 1 << 19  # logits of one head that are in memory at once: they stay in the caches of a CPU
FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with "


def repetition_of(policy: Policy) -> Repetition:
    """How a policy wants a text to be repeated, or the scorer within it.

    Raises:
        ValueError: for a policy without a second pass.
    """
    inner: object = policy
    while inner is not None:
        if isinstance(repetition := getattr(inner, "repetition", None), Repetition):
            return repetition
        inner = getattr(inner, "scorer", None)
    raise ValueError(f"lkv: expected a policy with a second pass, and a repetition that says how, got {policy}")


def in_words(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """The policy with the request of KVzip's authors for its repetition, in the model's chat template if it has one.

    A policy without a second pass, or with a request of its own, stays as it is; so does any beside a tokenizer that
    does not know the words.
    """
    if isinstance(policy, KVzip):
        repetition = policy.repetition
        first, later = (tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in (FIRST, LATER))
        if repetition.first or repetition.later or tokenizer.unk_token_id in first:
            return policy
        suffix = tuple(chat_frame(tokenizer)[1])
        return replace(policy, repetition=replace(repetition, first=first, later=later, suffix=suffix))
    scorer = getattr(policy, "scorer", None)
    return replace(policy, scorer=in_words(scorer, tokenizer)) if isinstance(scorer, Policy) else policy  # type: ignore[type-var]  # a dataclass


@torch.no_grad()
def repeat_scores(
    model: PreTrainedModel, context: Context, tokens: Tensor, policy: Policy, *, begin: int = 0
) -> list[Tensor]:
    """Scores of a policy that needs "second_pass": float32 `[B, H, n]` per layer, 0 in padding.

    Args:
        context: what was read.
        tokens: `[B, n]`, what it was read from, padded on the right with anything.
        begin: the first token that is repeated: those before it, such as a system prompt, score 0.

    Raises:
        ValueError: for tokens of another shape, and a model that does not attend to all in every layer.
    """
    size, repetition = context.size, repetition_of(policy)
    if tokens.shape != (context.batch, size):
        raise ValueError(f"lkv: expected tokens of shape [B, n] = {[context.batch, size]}, got {list(tokens.shape)}")
    scores = [k.new_zeros(k.shape[:3], dtype=torch.float32) for k in context.keys]
    for first, end, request in _chunks(repetition, tokens, begin):
        chunk = torch.cat([request, tokens[:, first:end]], 1)
        # Padding asks nothing. Of a text that has ended before nothing is noted: all its rows of the chunk are padding.
        counting = request.shape[1] + (context.lengths - first).clamp(max=end - first)
        received = Received(context, counting, (min(repetition.sink, first), first, end), scores)
        follow(model, context, chunk, attend=received)
    return scores


def _chunks(how: Repetition, tokens: Tensor, begin: int) -> Iterator[tuple[int, int, Tensor]]:
    """Bounds of every chunk, and the tokens that ask for it."""
    batch, size = tokens.shape
    for first in range(begin, size, how.chunk):
        words = how.first if first == begin else how.later
        lead = tokens[:, max(first - how.lead, begin) : first]  # that tell the model where it is
        ask, suffix = (tokens.new_tensor(x).expand(batch, -1) for x in (words, how.suffix))
        yield first, min(first + how.chunk, size), torch.cat([ask, lead, suffix], 1)


@dataclass(frozen=True)
class Received:
    """Attention of the tokens behind a context, as the model's own, that notes how much of it the rows receive.

    The most that a row receives is the exponential of its largest difference between a logit and the logsumexp of all
    logits of the same query: nothing needs the weights themselves but what the model goes on with.

    Attributes:
        counting: int `[B]`, how many of the tokens count: the first ones.
        rows: (sink, first, end): noted are rows [first, end), of a softmax over these, over the rows before `sink` and
            over the tokens themselves. None: all rows of the context.
        most: per layer float32 `[B, H, n]`, raised to the most attention that a token of any query head pays.
    """

    context: Context
    counting: Tensor
    rows: tuple[int, int, int] | None
    most: list[Tensor] = field(repr=False)

    @cached_property
    def bounds(self) -> tuple[int, int, int]:
        return self.rows or (0, 0, self.context.size)

    @cached_property
    def padding(self) -> Tensor | None:
        """float32 `[B, 1, 1, n]`, added to the logits; None where there is none. Looked at once: it synchronises."""
        there = bool((self.context.lengths < self.context.size).any())
        return visible(self.context, self.context.keys[0].device)[:, None, None] if there else None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> Tensor:
        _, softcap, sinks = logits
        plain = softcap is None and sinks is None and self.padding is None
        attend = self._in_pieces if plain and query.device.type == "cpu" else self._in_blocks
        out, total = attend(query, key, value, logits)
        tokens = torch.arange(query.shape[2], device=total.device)
        uncounted = tokens >= self.counting[:, None].to(tokens.device)
        self._note(layer, query, key, total.masked_fill_(uncounted[:, None], torch.inf), logits)
        return out

    def _in_pieces(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """`[B, Hq, m, Dv]`, and float32 `[B, Hq, m]`: the logsumexp of each query over the rows of the softmax.

        The fused attention of torch, over the rows between two bounds at a time; pieces are merged by their logsumexp.
        """
        size, (sink, begin, end) = self.context.size, self.bounds
        inner = [(a, b) for a, b in pairwise(sorted({0, sink, begin, end, size})) if a < b]
        pieces = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key[:, :, a:b], value[:, :, a:b], is_causal=a == size, scale=logits[0]
            )
            for a, b in [*inner, (size, key.shape[2])]
        ]
        sums = torch.stack([total for _, total in pieces])
        out = sum(part * weight[..., None] for (part, _), weight in zip(pieces, sums.softmax(0), strict=True))
        read = [b <= sink or begin <= a < end for a, b in inner]
        return out.to(value.dtype), sums[[*read, True]].logsumexp(0)

    def _in_blocks(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """The same by the definition, for everything that a model may do, in blocks of queries."""
        batch, heads, count, _ = query.shape
        out, total = query.new_empty(batch, heads, count, value.shape[-1]), self.most[0].new_empty(batch, heads, count)
        size, sinks, (sink, begin, end) = self.context.size, logits[2], self.bounds
        for head, own, block in self._blocks(query, key.shape[1], key.shape[2]):
            last = size + block.stop
            paid = _logits(query[:, own, block], key[:, head, :last], logits)
            if self.padding is not None:
                paid[..., :size] += self.padding
            width = block.stop - block.start
            future = torch.ones(width, width, dtype=torch.bool, device=query.device).triu(1)
            paid[..., size + block.start :].masked_fill_(future, -torch.inf)
            if sinks is not None:  # a column more, which nothing is read from
                column = sinks[own].float().view(1, -1, 1, 1).expand(*paid.shape[:3], 1)
                paid = torch.cat([paid, column], -1)
            weights = paid.softmax(-1)[..., :last].to(value.dtype)
            out[:, own, block] = (weights.flatten(1, 2) @ value[:, head, :last]).view(*weights.shape[:3], -1)
            parts = [paid[..., :sink], paid[..., begin:end], paid[..., size:]]
            total[:, own, block] = torch.cat(parts, -1).logsumexp(-1)
        return out, total

    def _note(self, layer: int, query: Tensor, key: Tensor, total: Tensor, logits: Logits) -> None:
        """Raises what rows receive. `total` is the logsumexp of each query, infinite for one that does not count."""
        _, begin, end = self.bounds
        best = self.most[layer].new_full((*key.shape[:2], end - begin), -torch.inf)
        for head, own, block in self._blocks(query, key.shape[1], end - begin):
            paid = _logits(query[:, own, block], key[:, head, begin:end], logits) - total[:, own, block, None]
            torch.maximum(best[:, head], paid.amax((1, 2)), out=best[:, head])
        if self.padding is not None:
            best += self.padding[:, 0, :, begin:end]
        noted = self.most[layer][..., begin:end]
        torch.maximum(noted, best.exp_(), out=noted)

    @staticmethod
    def _blocks(query: Tensor, heads: int, width: int) -> Iterator[tuple[int, slice, slice]]:
        """KV heads, their query heads, and queries whose logits of `width` columns are no more than `BLOCK`."""
        batch, all_heads, count, _ = query.shape
        group = all_heads // heads
        step = max(1, min(count, BLOCK // max(batch * group * width, 1)))
        for head in range(heads):
            for first in range(0, count, step):
                yield head, slice(head * group, (head + 1) * group), slice(first, min(first + step, count))


def _logits(query: Tensor, keys: Tensor, logits: Logits) -> Tensor:
    """float32 `[B, G, w, n]` of queries `[B, G, w, D]` and the keys `[B, n, D]` of their head."""
    scaling, softcap, _ = logits
    paid = ((query * scaling).flatten(1, 2) @ keys.transpose(1, 2)).float()
    if softcap is not None:
        paid = paid.div_(softcap).tanh_().mul_(softcap)
    return paid.view(*query.shape[:3], -1)
