"""The log-mask that a student sees: what is protected, how much is kept, and gradients through what is rounded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lkv import reference
from lkv.learn import distill
from lkv.passes import Context
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.lkv.head_budget import KINDS
from lkv.policies.lkv.token_scorer import SCALES

LAYERS, HEADS, DIM = 3, 2, 4
LENGTHS = [50, 29, 50]


def policy(
    budget: str = "capped", sink: int = 2, window: int = 5, floor: float = 0.01, scale: str = "standard"
) -> Learned:
    torch.manual_seed(5)
    design = Design(budget=budget, hidden=8, sink=sink, window=window, floor=floor, scale=scale)
    lkv = design.build(Shape("llama", LAYERS, HEADS, DIM, 16, 30))
    if lkv.scorer.offset is not None:
        with torch.no_grad():  # as logarithms of attention are: padding, which is 0, would be the best of all
            lkv.scorer.offset.copy_(torch.linspace(-9, -4, LAYERS * HEADS).view(LAYERS, HEADS))
    if lkv.budget.logits is not None:
        with torch.no_grad():
            lkv.budget.logits.mlp[2].weight.normal_(0, 1)
    return lkv


def reading(lengths: list[int], words: int | None = None) -> distill.Reading:
    """Features at random, or of so few words that most scores are equal."""
    g, size = torch.Generator().manual_seed(6), max(lengths)
    shape = (LAYERS, len(lengths), HEADS, size, 2 * DIM)
    x = torch.randn(shape, generator=g)
    if words is not None:
        x = torch.randn(LAYERS, HEADS, words, 2 * DIM, generator=g)[
            :, :, torch.randint(words, (len(lengths), size), generator=g)
        ].transpose(1, 2)
    context = Context((torch.zeros(1, 1, size, 1),), (torch.zeros(1, 1, size, 1),), torch.tensor(lengths))
    return distill.Reading(torch.zeros(len(lengths), size, dtype=torch.int64), context, tuple(x))


@pytest.mark.parametrize("retention", [0.3, 0.55, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_what_is_kept_makes_the_retention(kind: str, temperature: float, retention: float, scale: str) -> None:
    """Every text by itself, over all heads and layers, protected rows counted in; padding is never kept."""
    lkv = policy(kind, scale=scale)
    rates = torch.tensor([retention, retention / 1.2, 1.0])
    masks = distill.log_masks(lkv, reading(LENGTHS), rates, temperature, hard=False)
    assert masks.shape == (LAYERS, 3, HEADS, 50) and masks.dtype == torch.float32
    assert masks.max().item() <= 0 and masks.min().item() >= distill.FLOOR == -30
    for b, length in enumerate(LENGTHS):
        kept = masks[:, b].detach().exp().double()
        assert (kept[..., :2] == 1).all() and (kept[..., length - 5 : length] == 1).all()
        assert (masks[:, b, :, length:] == distill.FLOOR).all()
        want = float(rates[b]) * LAYERS * HEADS * length
        assert float(kept[..., :length].sum()) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_all_protected_is_seen_whole(kind: str, hard: bool) -> None:
    lkv, lengths = policy(kind), [50, 4, 7]
    masks = distill.log_masks(lkv, reading(lengths), torch.full((3,), 0.4), 0.3, hard)
    for b, length in enumerate(lengths[1:], 1):
        assert (masks[:, b, :, :length] == 0).all() and (masks[:, b, :, length:] == distill.FLOOR).all()
    masks.sum().backward()
    assert all(
        x.grad is None or bool(x.grad.isfinite().all()) for x in (*lkv.scorer.parameters(), *lkv.budget.parameters())
    )


@pytest.mark.parametrize("kind", ["capped", "softmax", "uniform"])
def test_masks_are_the_relaxed_top_k_of_what_competes(kind: str) -> None:
    """Against the bisection in float64: scores between the protected rows, and the head's share of their number."""
    lkv, given = policy(kind), reading(LENGTHS)
    rates = torch.tensor([0.4, 0.5, 0.6])
    masks = distill.log_masks(lkv, given, rates, 0.3, hard=False)
    for b, length in enumerate(LENGTHS):
        middle = length - 7
        share = lkv.budget((float(rates[b]) * length - 7) / middle)
        for layer in range(LAYERS):
            x = given.features[layer][b : b + 1, :, :length]
            scores = lkv.scorer(layer, x, torch.ones(1, HEADS, length, dtype=torch.bool))[0, :, 2 : length - 5]
            want = reference.soft_topk(scores, share[layer] * middle, 0.3, log=True).clamp(min=-30)
            torch.testing.assert_close(masks[layer, b, :, 2 : length - 5].double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", SCALES)
def test_a_threshold_is_one_over_all_heads_and_layers(scale: str) -> None:
    """The biased scores of all heads of a text compete for one number."""
    lkv, given = policy("threshold", scale=scale), reading(LENGTHS)
    rates = torch.tensor([0.4, 0.5, 0.6])
    masks = distill.log_masks(lkv, given, rates, 0.3, hard=False)
    for b, length in enumerate(LENGTHS):
        scores = []
        for layer in range(LAYERS):
            x = given.features[layer][b : b + 1, :, :length]
            raw = lkv.scorer(layer, x, torch.ones(1, HEADS, length, dtype=torch.bool))[0, :, 2 : length - 5]
            scores.append(raw + lkv.budget.bias()[layer][:, None])
        number = (float(rates[b]) * length - 7) * LAYERS * HEADS
        want = reference.soft_topk(torch.stack(scores).flatten(), number, 0.3, log=True).clamp(min=-30)
        got = masks[:, b, :, 2 : length - 5].reshape(-1).double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("words", [None, 4], ids=["all differ", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_hard_student_sees_as_many_as_are_kept(kind: str, words: int | None) -> None:
    """The best of every head, as many as the relaxed mask sums to: of equals, those that come first."""
    lkv, given = policy(kind), reading(LENGTHS, words)
    rates = torch.tensor([0.41, 0.52, 0.63])  # no halves, which rounding would decide
    soft, hard = (distill.log_masks(lkv, given, rates, 0.1, hard=hard) for hard in (False, True))
    assert set(hard.unique().tolist()) == {0.0, distill.FLOOR}
    for b, length in enumerate(LENGTHS):
        middle = slice(2, length - 5)
        for mine, relaxed in zip(hard[:, b].flatten(0, 1), soft[:, b].flatten(0, 1), strict=True):
            number = round(relaxed[middle].exp().sum().item())
            order = relaxed[middle].argsort(descending=True, stable=True)
            assert (mine[middle] == 0).nonzero().flatten().tolist() == sorted(order[:number].tolist())
            assert (mine[:2] == 0).all() and (mine[length - 5 : length] == 0).all() and (mine[length:] == -30).all()


@pytest.mark.parametrize(
    ("row", "kept"), [([0.2, 0.2, 0.2, 0.2], 1), ([0.4, 0.6, 0.6, 0.9], 2), ([0.1] * 4, 0), ([1.0] * 4, 4)]
)
def test_hard_masks_by_hand(row: list[float], kept: int) -> None:
    mask = distill.evicted(torch.tensor(row).log())
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:kept]
    assert mask.tolist() == [0.0 if i in best else -30.0 for i in range(len(row))]


@pytest.mark.parametrize("kind", ["capped", "softmax", "threshold"])
def test_gradients_of_the_hard_mask_are_those_of_the_relaxed_one(kind: str) -> None:
    """Exactly, for the same gradient from above; protected rows and padding send none."""
    lkv, given = policy(kind), reading(LENGTHS)
    upstream = torch.randn(LAYERS, 3, HEADS, 50, generator=torch.Generator().manual_seed(8))
    parameters = [*lkv.scorer.parameters(), *lkv.budget.parameters()]
    grads: list[list[Tensor]] = []
    for hard in (False, True):
        masks = distill.log_masks(lkv, given, torch.tensor([0.4, 0.5, 0.6]), 0.5, hard)
        grads.append(torch.autograd.grad((masks * upstream).sum(), parameters))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b) and a.any()
    masks = distill.log_masks(lkv, given, torch.tensor([0.4, 0.5, 0.6]), 0.5, True)
    protected = masks[..., :2].sum() + masks[:, 0, :, 45:].sum() + masks[:, 1, :, 24:].sum()
    assert all(g is None or not g.any() for g in torch.autograd.grad(protected, parameters, allow_unused=True))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_with_little_or_nothing_to_evict(kind: str, hard: bool) -> None:
    """As short as the protected rows or shorter, and retentions that these alone exceed: nothing that is not finite."""
    lengths = [40, 9, 7, 3, 1]
    lkv = policy(kind)
    masks = distill.log_masks(lkv, reading(lengths), torch.full((5,), 0.05), 0.3, hard)
    assert masks.isfinite().all()
    for b, length in enumerate(lengths):
        ends = [i for i in range(length) if i < 2 or i >= length - 5]
        assert (masks[:, b, :, ends] == 0).all() and (masks[:, b, :, length:] == -30).all()
        assert masks[:, b, :, 2 : max(length - 5, 2)].exp().sum().item() < 1e-3 * LAYERS * HEADS + 0.05
    whole = distill.log_masks(lkv, reading(lengths), torch.ones(5), 0.3, hard)
    for b, length in enumerate(lengths):
        assert (whole[:, b, :, :length] >= math.log(0.99)).all()
