"""One step of training, by hand: its loss, its gradients, and what the optimizer makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.learn import distill
from lkv.learn.config import TrainConfig
from lkv.learn.source import Examples
from lkv.learn.train import Trainer
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv import checkpoint
from lkv.policies.lkv.checkpoint import Design
from lkv.second_pass import repeat_scores
from lkv.tasks import Words

CONFIG = TrainConfig(
    design=Design(hidden=8, sink=1, window=2), tasks=("single", "multi_key"), steps=10, warm_steps=4, batch=2,
    questions=2, length=60, answer_tokens=4, validate_every=100, lr_scorer=3e-3, lr_budget=5e-2, retention=(0.3, 0.6),
)  # fmt: skip
Make = Callable[..., Trainer]


@pytest.fixture
def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Make:
    def trainer(model: PreTrainedModel = model, **changes: object) -> Trainer:
        run = Trainer(model, tokenizer, Words(), replace(CONFIG, **changes), tmp_path / "run")
        with torch.no_grad():  # heads differ
            run.lkv.budget.logits.mlp[2].weight.normal_(0, 1, generator=torch.Generator().manual_seed(1))
        return run

    return trainer


def uneven(step: int = 0) -> Examples:
    """Texts, questions and answers of several lengths, two questions a text."""
    g = torch.Generator().manual_seed(100 + step)

    def some(*lengths: int) -> list[list[int]]:
        return [torch.randint(4, 400, (n,), generator=g).tolist() for n in lengths]

    return Examples(some(50, 31), some(3, 5, 4, 2), some(2, 3, 1, 2))


def of_rows(examples: Examples, rows: list[int]) -> Examples:
    pairs = [2 * row + i for row in rows for i in range(2)]
    return Examples(
        [examples.contexts[row] for row in rows],
        [examples.questions[i] for i in pairs],
        [examples.answers[i] for i in pairs],
    )


def mean_gradients(run: Trainer, work: Callable[[], dict[str, float]]) -> tuple[dict[str, float], list[Tensor]]:
    """Numbers and gradients of a step whose update is looked at, and not taken."""
    seen = []

    def update(loss: Tensor, count: int, step: int, steps: int) -> float:
        seen.extend(p.grad.clone() / count if p.grad is not None else torch.zeros_like(p) for p in run.parameters)
        for p in run.parameters:
            p.grad = None
        return float(loss) / count

    run._update = update
    return work(), seen


def test_an_update_is_adamw_of_the_clipped_mean(make: Make) -> None:
    """Three in a row against the formulas in float64: per token, one norm for all, rates of their own."""
    run = make()
    scorer = len(list(run.lkv.scorer.parameters()))
    peaks = [CONFIG.lr_scorer] * scorer + [CONFIG.lr_budget] * (len(run.parameters) - scorer)
    assert len(run.parameters) > scorer
    g = torch.Generator().manual_seed(0)
    weights = [p.detach().double().clone() for p in run.parameters]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for t, (step, count, size) in enumerate([(0, 7, 0.001), (3, 50, 3.0), (9, 11, 1.0)], 1):
        given = [size * torch.randn(p.shape, generator=g) for p in run.parameters]
        if t == 2:
            given[0] = None  # no gradient: zero
        for p, grad in zip(run.parameters, given, strict=True):
            p.grad = None if grad is None else grad.clone() * count
        loss = run._update(torch.tensor(2.5 * count), count, step, 10)
        assert loss == pytest.approx(2.5)
        assert all(p.grad is None for p in run.parameters)
        mean = [torch.zeros_like(w) if x is None else x.double() for x, w in zip(given, weights, strict=True)]
        norm = torch.stack([(x**2).sum() for x in mean]).sum().sqrt()
        assert (norm > 1) == (t > 1)
        mean = [x / max(1.0, float(norm)) for x in mean]
        for i, x in enumerate(mean):
            first[i] = 0.9 * first[i] + 0.1 * x
            second[i] = 0.98 * second[i] + 0.02 * x**2
            a, b = first[i] / (1 - 0.9**t), second[i] / (1 - 0.98**t)
            weights[i] -= peaks[i] * CONFIG.rate_at(step, 10) * a / (b.sqrt() + 1e-8)
        for p, w in zip(run.parameters, weights, strict=True):
            torch.testing.assert_close(p.detach().double(), w, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_warm_start_regresses_on_the_logarithm_of_kvzip(make: Make, accumulate: int) -> None:
    """The mean over real tokens of all heads and layers of the squared difference, both standardised."""
    run = make(accumulate=accumulate)
    whole, requests = uneven(), []
    run.source.examples = lambda step, rows: (requests.append((step, rows)), of_rows(whole, rows))[1]
    run.step = -4
    numbers, gradients = mean_gradients(run, run._warm)
    assert requests == ([(-1, [0, 1])] if accumulate == 1 else [(-1, [0]), (-1, [1])])
    squares, count = torch.zeros((), dtype=torch.float64), 0
    for text in whole.contexts:
        reading = distill.read(run.model, run.lkv, [text])
        wanted = repeat_scores(run.model, reading.context, reading.tokens, KVzip())
        for layer, x in enumerate(reading.features):
            raw = run.lkv.scorer.raw(layer, x)[0]
            for head in range(2):
                mine, target = raw[head].double(), wanted[layer][0, head].double().clamp(min=1e-4).log()
                mine, target = ((t - t.mean()) / (t.var(correction=0) + 1e-6).sqrt() for t in (mine, target))
                squares, count = squares + ((mine - target) ** 2).sum(), count + len(text)
    assert count == 6 * (50 + 31)
    assert numbers["warm"] == pytest.approx(float(squares.detach()) / count, rel=1e-3)
    expected = torch.autograd.grad(squares / count, run.parameters, allow_unused=True)
    for got, want in zip(gradients, expected, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3 * float(want.abs().max()) + 1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [2, 8], ids=["soft", "hard"])
def test_a_step_is_the_mean_divergence_of_all_answer_tokens(make: Make, step: int, accumulate: int) -> None:
    """Each question on its own text alone, with the masks of that text, against all of them in one step."""
    run = make(accumulate=accumulate)
    whole, requests = uneven(step), []
    run.source.examples = lambda step, rows: (requests.append((step, rows)), of_rows(whole, rows))[1]
    run.step = step
    numbers, gradients = mean_gradients(run, run._distil)
    assert requests == ([(step, [0, 1])] if accumulate == 1 else [(step, [0]), (step, [1])])
    assert run.ends == [3]
    rate = torch.tensor([run.source.retention(step)])
    losses, tokens, agreed = [], 0, 0
    for row, text in enumerate(whole.contexts):
        reading = distill.read(run.model, run.lkv, [text])
        masks = distill.log_masks(run.lkv, reading, rate, run.config.temperature_at(step), hard=step == 8)
        for question in whole.questions[2 * row : 2 * row + 2]:
            results = distill.answers(run.model, reading.context, [question], CONFIG.answer_tokens, run.ends)
            loss, count, same = distill.divergence(run.model, reading.context, masks, [question], results)
            losses, tokens, agreed = [*losses, loss], tokens + count, agreed + int(same)
    loss = torch.stack(losses).sum() / tokens
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-3) and loss.item() > 1e-3
    assert numbers["fidelity"] == pytest.approx(agreed / tokens)
    assert numbers["hard"] == (step == 8) and numbers["retention"] == float(run.source.retention(step))
    assert numbers["temperature"] == run.config.temperature_at(step)
    for got, want in zip(gradients, torch.autograd.grad(loss, run.parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()) + 1e-7)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


def test_what_changes_from_step_to_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts, temperature, hardness and rates of a whole run; nothing is read twice, and each row once a step."""
    run, read, masked, rates = make(accumulate=2, batch=4), [], [], []
    examples, log_masks, step_of = run.source.examples, distill.log_masks, run.optimizer.step

    def spy(policy: object, reading: distill.Reading, rate: Tensor, temperature: float, hard: bool) -> Tensor:
        masked.append((rate.tolist(), temperature, hard))
        return log_masks(policy, reading, rate, temperature, hard)

    monkeypatch.setattr(distill, "log_masks", spy)
    run.source.examples = lambda step, rows: (read.append((step, list(rows))), examples(step, rows))[1]
    run.optimizer.step = lambda: (rates.append([g["lr"] for g in run.optimizer.param_groups]), step_of())[1]
    run.run()
    order = [-1, -1, -2, -3, -4, *range(10)]  # once more at the beginning, for mean and deviation of the input
    assert read == [(step, rows) for step in order for rows in ([0, 1], [2, 3])]
    assert [m[1:] for m in masked] == [(run.config.temperature_at(s), s >= 7) for s in range(10) for _ in range(2)]
    for i, (rate, *_) in enumerate(masked):
        assert rate == pytest.approx([run.source.retention(i // 2)] * 2)
    shares = [run.config.rate_at(s, 4) for s in range(4)] + [run.config.rate_at(s, 10) for s in range(10)]
    assert rates == [pytest.approx([3e-3 * share, 5e-2 * share]) for share in shares]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("warm_steps", [0, 2])
def test_the_input_is_standardised_by_the_texts_of_the_first_step(make: Make, warm_steps: int, accumulate: int) -> None:
    run = make(warm_steps=warm_steps, accumulate=accumulate)
    run.source.examples = lambda step, rows: of_rows(uneven(step), rows)
    run._fit_inputs()
    contexts = uneven(-1 if warm_steps else 0).contexts
    reading = distill.read(run.model, run.lkv, contexts)
    for layer, x in enumerate(reading.features):
        rows = torch.cat([x[b, :, : len(text)] for b, text in enumerate(contexts)], 1).double()
        torch.testing.assert_close(run.lkv.scorer.mean[layer].double(), rows.mean(1), rtol=1e-5, atol=1e-6)
        deviation = rows.var(1, correction=0).clamp(min=1e-6).sqrt()
        torch.testing.assert_close(run.lkv.scorer.deviation[layer].double(), deviation, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_absolute_scores_begin_at_the_mean_of_the_target(make: Make, accumulate: int) -> None:
    run = make(accumulate=accumulate, design=replace(CONFIG.design, scale="absolute"))
    run.source.examples = lambda step, rows: of_rows(uneven(step), rows)
    run._fit_outputs()
    readings = [distill.read(run.model, run.lkv, [text]) for text in uneven(-1).contexts]
    targets = [repeat_scores(run.model, x.context, x.tokens, KVzip()) for x in readings]
    for layer, offset in enumerate(run.lkv.scorer.offset):
        rows = torch.cat([x[layer][0] for x in targets], 1).double().clamp(min=1e-4).log()
        torch.testing.assert_close(offset.double(), rows.mean(1), rtol=1e-4, atol=1e-4)


def test_the_model_is_frozen(make: Make, model: PreTrainedModel) -> None:
    """Given in training mode, with dropout, it is read in eval mode, and not a bit of it changes."""
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    before = copy.deepcopy(model.state_dict())
    run = make(model.train().requires_grad_(True), steps=2, warm_steps=1)
    run.run()
    assert not any(module.training for module in model.modules())
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_beginnings_depend_on_the_seed_alone(make: Make) -> None:
    def weights(**changes: object) -> dict[str, Tensor]:
        torch.manual_seed(int(torch.randint(1000, (1,))))  # whatever was drawn before
        return {name: t.clone() for name, t in checkpoint.weights(make(**changes).lkv).items()}

    first, again, other = weights(), weights(), weights(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["scorer.up"], other["scorer.up"])
    assert not torch.equal(first["budget.logits.embedding.weight"], other["budget.logits.embedding.weight"])


def test_small_modules_and_their_gradients_are_float32_beside_a_bfloat16_model(
    make: Make, model: PreTrainedModel
) -> None:
    """The loss is that of the same weights in float32, to the rounding of the model's own activations."""
    half = copy.deepcopy(model).bfloat16()
    full = copy.deepcopy(half).float()
    losses = []
    for given in (half, full):
        run = make(given, steps=2)
        run._fit_inputs()
        run.source.examples = lambda step, rows: uneven()
        run.step = 0
        numbers, gradients = mean_gradients(run, run._distil)
        assert {t.dtype for t in (*gradients, *run.parameters)} == {torch.float32}
        losses.append(numbers["loss"])
    assert next(half.parameters()).dtype == torch.bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=0.15)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_cannot_be_shared_out_is_refused(make: Make, batch: int) -> None:
    run = make(batch=batch)
    run.accelerator = type("Two", (), dict(num_processes=2, process_index=0))()
    with pytest.raises(ValueError, match=rf"^lkv train: expected a batch that 2 parts divide, got {batch}$"):
        run._rows()


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_rows_are_shared_out_once_each(make: Make, accumulate: int, world: int) -> None:
    run, rows = make(batch=12, accumulate=accumulate), []
    for index in range(world):
        run.accelerator = type("Some", (), dict(num_processes=world, process_index=index))()
        mine = run._rows()
        assert len(mine) == accumulate and {len(part) for part in mine} == {12 // (accumulate * world)}
        rows += [row for part in mine for row in part]
    assert sorted(rows) == list(range(12))
