"""The second pass of KVzip (arXiv 2505.23416): the model is made to repeat a text that it has read.

A row is worth the most attention that any token of the repetition pays to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.hf.attention import Logits
from lkv.passes import Context, follow, visible
from lkv.policies import Policy
from lkv.policies.kvzip import KVzip, Repetition
from lkv.text import chat_frame

BLOCK = 1 << 19  # attention weights of one head that are in memory at once: they stay in the caches of a CPU
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
        # A text that has ended before has no queries, not even those of the request.
        counting = (context.lengths - first).clamp(max=end - first)
        counting = torch.where(counting > 0, request.shape[1] + counting, 0)
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

    In blocks of queries that see no later token, so that nothing larger than `BLOCK` weights is ever there.

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
    def padding(self) -> Tensor | None:
        """float32 `[B, 1, 1, n]`, added to the logits; None where there is none. Looked at once: it synchronises."""
        there = bool((self.context.lengths < self.context.size).any())
        return visible(self.context, self.context.keys[0].device)[:, None, None] if there else None

    @cached_property
    def least(self) -> int:
        """Tokens of which all sequences count."""
        return int(self.counting.min())

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> Tensor:
        batch, heads, count, _ = query.shape
        out = query.new_empty(batch, heads, count, value.shape[-1])
        group = heads // key.shape[1]
        step = max(1, min(count, BLOCK // (batch * group * key.shape[2])))
        for head in range(key.shape[1]):
            own = slice(head * group, (head + 1) * group)
            for first in range(0, count, step):
                queries = query[:, own, first : first + step]
                end = self.context.size + first + queries.shape[2]
                weights, rest = self._weights(queries, key[:, head, :end], first, own, logits)
                read = weights.to(value.dtype).flatten(1, 2) @ value[:, head, :end]
                out[:, own, first : first + step] = read.view(*weights.shape[:3], -1)
                self._note(self.most[layer][:, head], weights, rest, first)
        return out

    def _weights(
        self, query: Tensor, keys: Tensor, first: int, own: slice, logits: Logits
    ) -> tuple[Tensor, Tensor | None]:
        """float32 `[B, G, w, n + end]` of queries `[B, G, w, D]`, and what the sink of the model takes of each."""
        scaling, softcap, sinks = logits
        size, count = self.context.size, query.shape[2]
        paid = ((query * scaling).flatten(1, 2) @ keys.transpose(1, 2)).float()
        if softcap is not None:
            paid = paid.div_(softcap).tanh_().mul_(softcap)
        paid = paid.view(*query.shape[:3], -1)
        if self.padding is not None:
            paid[..., :size] += self.padding
        future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        paid[..., size + first :].masked_fill_(future, -torch.inf)
        if sinks is None:
            return paid.softmax(-1), None
        column = sinks[own].float().view(1, -1, 1, 1).expand(*paid.shape[:3], 1)
        weights = torch.cat([paid, column], -1).softmax(-1)
        return weights[..., :-1], weights[..., -1:]

    def _note(self, most: Tensor, weights: Tensor, rest: Tensor | None, first: int) -> None:
        """Raises `[B, n]` of one head to what it receives in a block."""
        size = self.context.size
        sink, begin, end = self.rows or (0, 0, size)
        received = weights[..., begin:end]
        if (sink, begin, end) != (0, 0, size):
            parts = [weights[..., :sink], received, weights[..., size:], *([] if rest is None else [rest])]
            total = torch.stack([part.sum(-1, keepdim=True) for part in parts]).sum(0)
            received = received / total.clamp(min=1e-30)
        last = first + weights.shape[2]
        if last > self.least:
            counts = torch.arange(first, last, device=most.device) < self.counting[:, None]
            received = received * counts[:, None, :, None]
        torch.maximum(most[:, begin:end], received.amax((1, 2)), out=most[:, begin:end])
