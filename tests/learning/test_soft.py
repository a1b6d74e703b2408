"""Accuracy through the relaxed mask: all of a text at retention 1, below it what the mask of the training leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import tasks
from lkv.evaluate import soft
from lkv.evaluate.methods import FULL, Method
from lkv.evaluate.run import Setting, evaluate
from lkv.evaluate.soft import soft_accuracy
from lkv.learn import distill
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import Design, Shape


@pytest.fixture
def policy(model: PreTrainedModel) -> Learned:
    torch.manual_seed(5)
    return Design(hidden=8).build(Shape.of(model))


@pytest.fixture
def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tasks.Sample]:
    """What is expected is the answer of the full cache, three tokens of it, and half of that in the last sample."""
    made = [tasks.make("multi_key", i, length) for i, length in enumerate((100, 120, 110))]
    results = evaluate(model, tokenizer, made, [Method(FULL, None)], Setting(batch=1, limit=3))
    answers_now = [replace(s, expected=(r.text,)) for s, r in zip(made, results, strict=True)]
    return [*answers_now[:-1], replace(answers_now[-1], expected=(answers_now[-1].expected[0], "never an answer"))]


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_nothing_is_hidden_at_retention_1(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Learned, samples: list[tasks.Sample], batch: int
) -> None:
    """The share of the expected strings that are found, averaged over samples, whatever batch they were in."""
    assert soft_accuracy(model, tokenizer, samples, policy, 1.0, batch, limit=3) == pytest.approx(2.5 / 3)


def test_limit_is_the_length_of_the_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Learned, samples: list[tasks.Sample]
) -> None:
    assert soft_accuracy(model, tokenizer, samples, policy, 1.0, limit=2) == 0
    assert soft_accuracy(model, tokenizer, samples, policy, 1.0, limit=4) == pytest.approx(2.5 / 3)


def test_nothing_is_kept_for_gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: Learned,
    samples: list[tasks.Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks, made = [], distill.log_masks
    monkeypatch.setattr(
        distill, "log_masks", lambda *args, **options: masks.append(made(*args, **options)) or masks[-1]
    )
    soft_accuracy(model, tokenizer, samples[:1], policy, 0.5, limit=1)
    assert masks and not any(mask.requires_grad for mask in masks[0])


def test_less_is_seen_below(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Learned, samples: list[tasks.Sample]
) -> None:
    assert soft_accuracy(model, tokenizer, samples, policy, 0.15, limit=3) < 2.5 / 3


def test_mask_is_the_relaxed_one_at_the_last_temperature(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: Learned,
    samples: list[tasks.Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = []
    own = distill.log_masks

    def watched(of: Learned, reading: object, rates: torch.Tensor, temperature: float, hard: bool) -> torch.Tensor:
        requests.append((of, rates.tolist(), temperature, hard))
        return own(of, reading, rates, temperature, hard)

    monkeypatch.setattr(soft.distill, "log_masks", watched)
    soft_accuracy(model, tokenizer, samples, policy, 0.25, batch=2, limit=1)
    assert requests == [(policy, [0.25, 0.25], 0.05, False), (policy, [0.25], 0.05, False)]
    soft_accuracy(model, tokenizer, samples, policy, 0.25, limit=1, temperature=1.0)
    assert requests[-1] == (policy, [0.25] * 3, 1.0, False)
