"""The student: what it sees is what eviction would leave, and gradients reach nothing but LKV."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from lkv.evaluate.decode import answer
from lkv.hf import Cache
from lkv.learn import distill
from lkv.passes import follow
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import Design, Shape

LENGTHS = [60, 47]


def policy(model: PreTrainedModel, **design: object) -> Learned:
    torch.manual_seed(3)
    lkv = Design(hidden=16, floor=0.0, **design).build(Shape.of(model))
    if lkv.budget.logits is not None:
        with torch.no_grad():
            lkv.budget.logits.mlp[2].weight.normal_(0, 2)
    return lkv


def texts(lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, 400, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("input", ["kv", "hidden"])
def test_reading_is_the_models_own_cache(model: PreTrainedModel, input: str) -> None:
    reading = distill.read(model, policy(model, input=input), texts())
    for b, text in enumerate(texts()):
        cache = model(torch.tensor([text]), use_cache=True).past_key_values
        for layer in range(3):
            torch.testing.assert_close(reading.context.keys[layer][b, :, : len(text)], cache.layers[layer].keys[0])
    assert reading.features[0].shape == ((2, 2, 60, 32) if input == "kv" else (2, 1, 60, 32))


@torch.no_grad()
def test_what_follows_a_context_is_the_model_itself(model: PreTrainedModel) -> None:
    context = distill.read(model, policy(model), texts()).context
    after = torch.randint(4, 400, (2, 7))
    hidden = follow(model, context, after)
    for b, text in enumerate(texts()):
        whole = model.model(torch.tensor([text + after[b].tolist()])).last_hidden_state
        torch.testing.assert_close(hidden[b], whole[0, len(text) :], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(follow(model, context.repeat(2), after.repeat_interleave(2, 0))[2], hidden[1])


@torch.no_grad()
@pytest.mark.parametrize("budget", ["capped", "threshold", "uniform"])
def test_the_hard_student_sees_what_eviction_leaves(model: PreTrainedModel, budget: str) -> None:
    """Masked attention of the training and decoding from the ragged cache, to rounding."""
    lkv, text = policy(model, budget=budget), texts([60])
    reading = distill.read(model, lkv, text)
    masks = distill.log_masks(lkv, reading, torch.tensor([0.4]), 0.02, hard=True)
    assert set(masks.unique().tolist()) == {0.0, distill.FLOOR}
    after = torch.randint(4, 400, (1, 5))
    student = follow(model, reading.context, after, log_masks=masks)
    kept = (masks == 0).sum(-1)[:, 0]
    with Cache(model, replace(lkv), retention=0.4) as cache:
        model.model(torch.tensor(text), past_key_values=cache, use_cache=True)
        rows = torch.stack([layer.rows.lengths[0] for layer in cache.ragged])
        evicted = torch.cat(
            [
                model.model(after[:, i : i + 1], past_key_values=cache, use_cache=True).last_hidden_state
                for i in range(5)
            ],
            1,
        )
    assert (kept - rows).abs().max() <= 1  # budgets are rounded one by one here, and to an exact sum there
    if torch.equal(kept, rows.long()):
        torch.testing.assert_close(student, evicted, rtol=1e-3, atol=1e-3)
    else:
        assert budget != "uniform"


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("budget", ["capped", "softmax", "threshold"])
def test_gradients_reach_budgets_and_scores_and_nothing_else(model: PreTrainedModel, budget: str, hard: bool) -> None:
    model.requires_grad_(False)
    lkv = policy(model, budget=budget)
    reading = distill.read(model, lkv, texts())
    questions = [[5, 6, 7], [8, 9]]
    results = distill.answers(model, reading.context, questions, 4, [3])
    masks = distill.log_masks(lkv, reading, torch.tensor([0.4, 0.4]), 0.5, hard)
    loss, count, same = distill.divergence(model, reading.context, masks, questions, results)
    assert loss > 0 and count == sum(map(len, results)) and 0 <= same <= count
    loss.backward()
    for module in (lkv.scorer, lkv.budget):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert lkv.scorer.up.grad.abs().sum() > 0
    assert lkv.budget.logits.mlp[2].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()
def test_seeing_everything_is_being_the_teacher(model: PreTrainedModel) -> None:
    reading = distill.read(model, policy(model), texts())
    masks = torch.zeros(3, 2, 2, 60)
    loss, _, same = distill.divergence(model, reading.context, masks, [[5, 6], [7]], [[8, 9], [10]])
    assert abs(loss) < 1e-5 and same == 3


@torch.no_grad()
def test_teachers_answers_are_greedy(model: PreTrainedModel) -> None:
    text, question = texts([60]), [[5, 6, 7]]
    results = distill.answers(model, distill.read(model, policy(model), text).context, question, 6, [3])
    tokens = text[0] + question[0]
    for _ in range(len(results[0])):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert results[0] == tokens[63:]
    context = distill.read(model, policy(model), text).context.repeat(3)
    drafts = [results[0], [results[0][0], 499 - results[0][1], *results[0][2:]], [9, 9, 9, 9, 9, 9, 9, 9]]
    assert distill.answers(model, context, question * 3, 6, [3], drafts) == results * 3


@torch.no_grad()
@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_answers_end_with_their_first_end_token(model: PreTrainedModel, masked: bool, drafted: bool) -> None:
    """Each where it comes, while the others go on with a context and masks of their own."""
    lkv, text, questions = policy(model), texts([40, 33, 51]), [[5, 6, 7], [8, 9], [10]]
    reading = distill.read(model, lkv, text)
    masks = distill.log_masks(lkv, reading, torch.tensor([0.2, 0.3, 0.25]), 0.1, True) if masked else None
    endless = distill.answers(model, reading.context, questions, 9, [], log_masks=masks)
    assert [len(row) for row in endless] == [9, 9, 9]
    drafts = endless if drafted else None
    for stops in ([endless[0][0]], [endless[1][2]], [endless[2][5], endless[0][3]], [endless[1][8]]):
        want = []
        for row in endless:
            end = next((i + 1 for i, token in enumerate(row) if token in stops), 9)
            want.append(row[:end])
        assert any(len(row) < 9 or row[-1] in stops for row in want)
        assert distill.answers(model, reading.context, questions, 9, stops, drafts, masks) == want


@torch.no_grad()
def test_answers_after_eviction_of_padded_questions_are_those_of_each_alone(model: PreTrainedModel) -> None:
    text, questions = texts([50, 50]), [[5, 6, 7, 8], [9, 10]]

    def results(rows: list[int]) -> list[list[int]]:
        with Cache(model, policy(model), retention=0.5) as cache:
            tokens = torch.tensor([text[b] for b in rows])
            model.model(tokens, past_key_values=cache, use_cache=True)
            seen = torch.ones_like(tokens)
            return answer(model, cache, seen, [questions[b] for b in rows], 5, 0, [3])

    assert results([0, 1]) == results([0]) + results([1])
