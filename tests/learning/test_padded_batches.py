"""What is learned from a text does not depend on the texts beside it: every pass over a batch of several lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from own_settings import build
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import second_pass_scores
from lkv.hf import Cache
from lkv.learn import distill
from lkv.passes import Context, follow
from lkv.policies import KVzip, StreamingLLM
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.lkv.token_scorer import moments
from lkv.retriever.data import IGNORE, Stage, texts
from lkv.retriever.train import loss_of
from lkv.second_pass import repeat_scores
from lkv.tasks import Words

LENGTHS = [41, 23, 16, 41]
CLOSE = dict(rtol=1e-3, atol=1e-4)


def some(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 64) for _ in range(n)] for n in lengths]


def policy(model: PreTrainedModel, **design: object) -> Learned:
    torch.manual_seed(3)
    lkv = Design(hidden=8, floor=0.0, sink=2, window=3, **design).build(Shape.of(model))
    if lkv.budget.logits is not None:
        with torch.no_grad():
            lkv.budget.logits.mlp[2].weight.normal_(0, 2)
    return lkv


def spoiled(context: Context, by: float) -> Context:
    """The same rows, and something else in the padding."""
    there = torch.arange(context.size) < context.lengths[:, None]
    keys, values = (
        tuple(t.masked_fill(~there[:, None, :, None], by) for t in part) for part in (context.keys, context.values)
    )
    return Context(keys, values, context.lengths)


@torch.no_grad()
@pytest.mark.parametrize("name", ["scale and soft cap", "sinks", "part of a head rotated", "one head"])
def test_what_follows_a_text_is_the_model_itself(name: str) -> None:
    """Read together, whatever pads them, as alone without any cache."""
    model, contexts, after = build(name), some(LENGTHS), some([7, 9, 1, 4], 1)
    context = spoiled(together(model, contexts), 3.0)
    tokens, _ = distill.pad_right(after, torch.device("cpu"))
    hidden = follow(model, context, tokens)
    for b, (text, more) in enumerate(zip(contexts, after, strict=True)):
        whole = model.model(torch.tensor([text + more]), use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden[b, : len(more)], whole[0, len(text) :], **CLOSE)


def together(model: PreTrainedModel, contexts: list[list[int]]) -> Context:
    """For several texts, whatever `distill.read` can read."""
    rows = [model(torch.tensor([text]), use_cache=True).past_key_values.layers for text in contexts]
    size = max(map(len, contexts))

    def stack(name: str) -> tuple[Tensor, ...]:
        wide = [[torch.nn.functional.pad(getattr(x, name), (0, 0, 0, size - x.keys.shape[2])) for x in r] for r in rows]
        return tuple(map(torch.cat, zip(*wide, strict=True)))

    return Context(stack("keys"), stack("values"), torch.tensor([len(text) for text in contexts]))


@pytest.mark.parametrize("input", ["kv", "hidden"])
def test_reading(model: PreTrainedModel, input: str) -> None:
    lkv, contexts = policy(model, input=input), some(LENGTHS)
    reading = distill.read(model, lkv, contexts)
    assert reading.valid[:, 0].sum(1).tolist() == LENGTHS == reading.context.lengths.tolist()
    for b, text in enumerate(contexts):
        alone = distill.read(model, lkv, [text])
        assert reading.tokens[b].tolist() == text + [0] * (41 - len(text))
        pairs = zip(
            [*reading.context.keys, *reading.context.values, *reading.features],
            [*alone.context.keys, *alone.context.values, *alone.features],
            strict=True,
        )
        for ours, own in pairs:
            torch.testing.assert_close(ours[b, :, : len(text)], own[0], **CLOSE)
            assert (ours[b, :, len(text) :] == 0).all()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("budget", ["capped", "softmax", "threshold", "uniform"])
def test_log_masks(model: PreTrainedModel, budget: str, hard: bool) -> None:
    lkv, contexts = policy(model, budget=budget), some(LENGTHS)
    reading, rates = distill.read(model, lkv, contexts), torch.tensor([0.4, 0.6, 0.5, 0.9])
    dirty = distill.Reading(
        reading.tokens,
        reading.context,
        tuple(x.masked_fill(~reading.valid[..., None], 5.0) for x in reading.features),
    )
    masks = distill.log_masks(lkv, dirty, rates, 0.3, hard)
    for b, text in enumerate(contexts):
        alone = distill.log_masks(lkv, distill.read(model, lkv, [text]), rates[b : b + 1], 0.3, hard)
        torch.testing.assert_close(masks[:, b, :, : len(text)], alone[:, 0], **CLOSE)
        assert (masks[:, b, :, len(text) :] == distill.FLOOR).all()


def test_answers_and_divergence(model: PreTrainedModel) -> None:
    """Questions and answers are of several lengths too; what is summed is the sum of the parts."""
    lkv, contexts, questions = policy(model), some(LENGTHS), some([3, 5, 1, 2], 2)
    reading = distill.read(model, lkv, contexts)
    masks = distill.log_masks(lkv, reading, torch.full((4,), 0.4), 0.5, False).detach()
    results = distill.answers(model, reading.context, questions, 6, [3])
    student = distill.answers(model, reading.context, questions, 6, [3], log_masks=masks)
    short = [results[0][:1], results[1], results[2][:4], results[3][:2]]
    whole, count, same = distill.divergence(model, reading.context, masks, questions, short)
    losses, right = [], 0
    for b, question in enumerate(questions):
        one = distill.read(model, lkv, contexts[b : b + 1]).context
        mask = masks[:, b : b + 1, :, : LENGTHS[b]]
        assert distill.answers(model, one, [question], 6, [3]) == [results[b]]
        assert distill.answers(model, one, [question], 6, [3], log_masks=mask) == [student[b]]
        loss, tokens, agreed = distill.divergence(model, one, mask, [question], [short[b]])
        assert tokens == len(short[b])
        losses, right = [*losses, loss], right + int(agreed)
    assert count == sum(map(len, short)) and int(same) == right
    torch.testing.assert_close(whole, sum(losses), **CLOSE)


def test_moments_of_the_input(model: PreTrainedModel) -> None:
    lkv, contexts = policy(model), some(LENGTHS)
    reading = distill.read(model, lkv, contexts)
    valid = reading.valid.expand(-1, 2, -1)
    parts = [distill.read(model, lkv, [text]) for text in contexts]
    for layer, x in enumerate(reading.features):
        alone = [moments(one.features[layer], one.valid.expand(-1, 2, -1)) for one in parts]
        torch.testing.assert_close(moments(x, valid), sum(alone), **CLOSE)
        torch.testing.assert_close(moments(x + 9.0 * ~valid[..., None], valid), sum(alone), **CLOSE)


@torch.no_grad()
def test_second_pass_over_texts_that_are_padded_in_front(model: PreTrainedModel) -> None:
    contexts = some(LENGTHS)
    tokens = torch.tensor([[0] * (41 - len(text)) + text for text in contexts])
    present = (torch.arange(41) >= 41 - torch.tensor(LENGTHS)[:, None]).long()
    places = (present.cumsum(1) - 1).clamp(min=0)
    with Cache(model, StreamingLLM(), retention=1.0, chunks="last") as whole:
        model.model(tokens, attention_mask=present, position_ids=places, past_key_values=whole, use_cache=True)
        scores = second_pass_scores(model, whole, tokens, KVzip())
    for b, text in enumerate(contexts):
        alone = repeat_scores(model, together(model, [text]), torch.tensor([text]), KVzip())
        for layer in range(3):
            torch.testing.assert_close(scores[layer][b, :, 41 - len(text) :], alone[layer][0], **CLOSE)
            assert (scores[layer][b, :, : 41 - len(text)] == 0).all()


def test_the_loss_of_the_retriever(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of all labels, those of padding apart."""
    tokens, labels = texts(random.Random(4), words, Stage(64, 4, 5, 1))
    ends = [int((row != words.vocabulary["<pad>"]).sum()) for row in tokens]
    assert len(set(ends)) > 1 and (labels[torch.arange(tokens.shape[1]) >= torch.tensor(ends)[:, None]] == IGNORE).all()
    monkeypatch.setattr(torch, "autocast", lambda *args: torch.no_grad())  # whose rounding differs with the shape
    loss, right = loss_of(model, tokens, labels)
    parts = [loss_of(model, tokens[b : b + 1, :end], labels[b : b + 1, :end]) for b, end in enumerate(ends)]
    counts = torch.tensor([len(r) for _, r in parts])
    assert torch.equal(right, torch.cat([r for _, r in parts])) and counts.sum() == (labels != IGNORE).sum()
    torch.testing.assert_close(loss, (torch.stack([x for x, _ in parts]) * counts).sum() / counts.sum(), **CLOSE)
