"""Distillation of the full cache into one that is evicted: what one step computes.

The context is read once, dense and without gradient. Then the same frozen model goes over question and answer twice:
as the teacher on all rows, as the student through a log-mask. The loss is the forward KL of the two on the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lkv.hf import Cache
from lkv.hf.compat import find_decoder
from lkv.hf.observation import observe
from lkv.passes import Context, follow
from lkv.policies import Observation
from lkv.policies.lkv import Learned

FLOOR = -30.0  # log-mask of a token that is evicted for good: finite, so that its score is reached by gradients


@dataclass(frozen=True)
class Reading:
    """What was read, and what the scorers see of it.

    Attributes:
        tokens: `[B, n]`, padded on the right.
        features: per layer `[B, H, n, F]` or `[B, 1, n, F]`.
    """

    tokens: Tensor
    context: Context
    features: tuple[Tensor, ...]

    @property
    def valid(self) -> Tensor:
        """bool `[B, 1, n]`."""
        size = self.tokens.shape[1]
        return (torch.arange(size, device=self.tokens.device) < self.context.lengths[:, None])[:, None]


@torch.no_grad()
def read(model: PreTrainedModel, policy: Learned, contexts: Sequence[Sequence[int]]) -> Reading:
    """Prefills texts with the model's own attention; those of one length together.

    Raises:
        ValueError: for a model of which some layers hold no keys of all tokens: sliding, shared or recurrent ones.
    """
    layers = len(find_decoder(model).readers)
    if layers != policy.budget.layers:
        raise ValueError(
            f"lkv.learn: expected full attention in all {policy.budget.layers} layers, each with keys of its own, got "
            f"{layers} such layers in {type(model).__name__}"
        )
    lengths = [len(c) for c in contexts]
    size, device = max(lengths), model.device
    tokens = torch.zeros(len(contexts), size, dtype=torch.int64, device=device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    seen: list[Tensor] = []
    for length in set(lengths):
        rows = [b for b, n in enumerate(lengths) if n == length]
        text = torch.tensor([list(contexts[b]) for b in rows], device=device)
        tokens[rows, :length] = text
        with Cache(model, policy, retention=1.0, chunks="last") as cache:
            model.get_decoder()(text, past_key_values=cache, use_cache=True)
            for i, layer in enumerate(cache.ragged):
                observed = observe(layer, policy.needs, 1)
                for parts, new in (
                    (keys, observed.keys),
                    (values, observed.values),
                    (seen, features(policy.token_scorer.input, observed)),
                ):
                    if len(parts) <= i:
                        parts.append(new.new_zeros(len(contexts), new.shape[1], size, new.shape[3]))
                    parts[i][rows, :, :length] = new
    context = Context(tuple(keys), tuple(values), torch.tensor(lengths, device=device))
    return Reading(tokens, context, tuple(seen))


def features(input: str, observation: Observation) -> Tensor:
    """What LKV-T reads of a layer: `[B, H, n, D + Dv]`, or `[B, 1, n, hidden]`."""
    if input == "kv":
        return torch.cat([observation.part("pre_rope_keys"), observation.values], -1)
    return observation.part("hidden_states")[:, None]


def log_masks(policy: Learned, reading: Reading, retention: Tensor, temperature: float, hard: bool) -> Tensor:
    """What the student sees of every token, `[N, B, H, n]`: 0 for all of it, `FLOOR` for nothing.

    The protected rows at both ends are seen in full, and their number comes off the budgets.

    Args:
        retention: `[B]`.
        hard: whether the student sees what eviction would leave; gradients are those of the relaxation all the same.
    """
    valid, scorer = reading.valid, policy.token_scorer
    scores = torch.stack(
        [scorer(layer, x, valid.expand(-1, scorer.heads, -1)) for layer, x in enumerate(reading.features)]
    )
    lengths = reading.context.lengths
    size, sink, window = scores.shape[3], policy.sink, policy.window
    middle = (lengths - sink - window).clamp(min=0)
    soft = policy.budget.log_masks(scores[..., sink:], retention, temperature, lengths, middle)
    soft = soft.clamp(min=FLOOR)
    if hard:
        soft = soft + (evicted(soft.detach()) - soft).detach()
    places = torch.arange(size, device=soft.device)
    protected = ((places < sink) | (places >= sink + middle[:, None])) & (places < lengths[:, None])
    return F.pad(soft, (sink, 0), value=FLOOR).masked_fill(protected[:, None], 0.0)


def evicted(soft: Tensor) -> Tensor:
    """The log-mask `[..., m]` of the tokens that are kept when as many are as a relaxed one sums to.

    Ties go to the lower position, as in `evict`: where a word stands twice its scores are equal in the first layer.
    """
    number = soft.exp().sum(-1, keepdim=True).round()
    order = soft.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(soft.shape[-1], device=soft.device)
    return torch.empty_like(soft).scatter_(-1, order, torch.where(ranks < number, 0.0, FLOOR))


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    context: Context,
    questions: Sequence[Sequence[int]],
    limit: int,
    ends: Sequence[int],
    drafts: Sequence[Sequence[int]] | None = None,
    log_masks: Tensor | None = None,
) -> list[list[int]]:
    """What the teacher answers, greedily, its end token included; with log-masks `[N, B, H, n]` the student.

    Args:
        limit: most tokens of an answer.
        drafts: what it probably answers. Read in one pass and kept as far as the teacher agrees, as in speculative
            decoding (arXiv 2211.17192): the answers are the same, in fewer passes.
    """
    out: list[list[int]] = [[] for _ in questions]
    guesses = [list(draft[:limit]) for draft in drafts] if drafts is not None else [[] for _ in questions]
    stops, left = set(ends), list(range(len(out)))
    while left:
        rows = [[*questions[b], *out[b], *guesses[b]] for b in left]
        tokens, _ = pad_right(rows, context.lengths.device)
        masks = None if log_masks is None else log_masks[:, left]
        hidden = follow(model, context.pick(left), tokens, log_masks=masks)
        for i, b in enumerate(left):
            begin = len(questions[b]) + len(out[b]) - 1
            predicted = (
                model.get_output_embeddings()(hidden[i, begin : begin + len(guesses[b]) + 1]).argmax(-1).tolist()
            )
            agreed = next(
                (j for j, (t, g) in enumerate(zip(predicted, guesses[b], strict=False)) if t != g), len(guesses[b])
            )
            new = predicted[: agreed + 1]
            end = next((j + 1 for j, token in enumerate(new) if token in stops), len(new))
            out[b] = [*out[b], *new[:end]][:limit]
            guesses[b] = []
        left = [b for b in left if len(out[b]) < limit and out[b][-1] not in stops]
    return out


def divergence(
    model: PreTrainedModel,
    context: Context,
    masks: Tensor,
    questions: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
) -> tuple[Tensor, int, Tensor]:
    """KL(teacher || student), summed over all answer tokens.

    Returns:
        the sum, the number of answer tokens, and of how many both foretell the same, as a tensor.
    """
    tokens, _ = pad_right([[*q, *a] for q, a in zip(questions, replies, strict=True)], masks.device)
    places = torch.arange(tokens.shape[1] - 1, device=masks.device)
    begins, ends = (
        torch.tensor(x, device=masks.device)[:, None]
        for x in (
            [len(q) - 1 for q in questions],
            [len(q) + len(a) - 1 for q, a in zip(questions, replies, strict=True)],
        )
    )
    at = (places >= begins) & (places < ends)
    head = model.get_output_embeddings()
    with torch.no_grad():
        teacher = head(follow(model, context, tokens[:, :-1])[at]).float().log_softmax(-1)
    student = head(follow(model, context, tokens[:, :-1], log_masks=masks)[at]).float().log_softmax(-1)
    loss = F.kl_div(student, teacher, reduction="sum", log_target=True)
    same = (student.argmax(-1) == teacher.argmax(-1)).sum()
    return loss, teacher.shape[0], same.detach()


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`[B, m]` tokens with zeros behind, and how many each row has."""
    lengths = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.int64, device="cpu")
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row, device="cpu")
    return tokens.to(device), torch.tensor(lengths, device=device)
