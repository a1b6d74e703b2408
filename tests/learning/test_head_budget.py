"""LKV-H: shares whose sum is exact for every retention, and masks that sum to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lkv import reference
from lkv.policies.lkv.head_budget import KINDS, HeadBudget, pour

STATIC = [kind for kind in KINDS if kind != "threshold"]
RETENTIONS = [0.004, 0.05, 0.15, 0.5, 0.97, 1.0]


def trained(kind: str, spread: float = 4.0) -> HeadBudget:
    """As if trained: logits far apart."""
    torch.manual_seed(1)
    budget = HeadBudget(3, 4, kind)
    if budget.logits is not None:
        with torch.no_grad():
            budget.logits.mlp[2].weight.normal_(0, spread)
    return budget


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("retention", RETENTIONS)
def test_shares_are_within_bounds_and_their_mean_is_exact(kind: str, retention: float) -> None:
    shares = trained(kind)(retention)
    assert shares.shape == (3, 4)
    assert shares.mean().item() == pytest.approx(retention, rel=1e-5)
    assert shares.min() >= min(retention, 0.005) - 1e-6
    assert shares.max() <= 1 + 1e-6


@pytest.mark.parametrize("kind", STATIC)
def test_untrained_heads_are_equal(kind: str) -> None:
    torch.testing.assert_close(HeadBudget(3, 4, kind)(0.2), torch.full((3, 4), 0.2))


@pytest.mark.parametrize("kind", ["capped", "softmax"])
def test_one_order_of_heads_for_all_retentions(kind: str) -> None:
    budget = trained(kind)
    order = budget.logits().flatten().argsort()
    previous = torch.zeros(12)
    for retention in RETENTIONS:
        shares = budget(retention).flatten()
        assert (shares[order].diff() >= -1e-6).all()
        assert (shares >= previous - 1e-6).all()  # more for all is less for nobody
        previous = shares


def test_a_batch_of_retentions_is_each_of_them() -> None:
    budget = trained("capped")
    together = budget(torch.tensor(RETENTIONS))
    torch.testing.assert_close(together, torch.stack([budget(r) for r in RETENTIONS]))


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("length", [1, 37, 4096])
def test_tables_spend_the_total(kind: str, length: int) -> None:
    for total in {0, 1, 12 * length // 7, 12 * length - 1, 12 * length}:
        for protected in (0, 4, 40):
            table = trained(kind).table(total, length, protected)
            assert int(table.sum()) == total
            assert table.max() <= length
            assert table.min() >= min(protected, length, total // 12)


def test_pour_fills_heads_to_the_brim_and_gives_the_rest_to_others() -> None:
    shares = torch.tensor([0.7, 0.2, 0.1])
    torch.testing.assert_close(pour(shares, torch.tensor(0.9)), torch.tensor([0.63, 0.18, 0.09]))
    torch.testing.assert_close(pour(shares, torch.tensor(1.9)), torch.tensor([1.0, 0.6, 0.3]))
    torch.testing.assert_close(pour(shares, torch.tensor(3.0)), torch.ones(3))


def test_shares_are_a_relaxed_top_k_of_the_logits() -> None:
    """The same relaxation one level up, in float64: floors first, then the rest among what heads have above them."""
    for options, temperature in ((dict(temperature=0.5), 0.5), ({}, 1.0)):
        torch.manual_seed(2)
        budget = HeadBudget(2, 3, floor=0.125, **options)
        with torch.no_grad():
            budget.logits.mlp[2].weight.normal_(0, 3)
        logits = budget.logits().flatten().detach()
        for retention in (0.2, 0.5, 0.9):
            above = reference.soft_topk(logits, (retention - 0.125) / 0.875 * 6, temperature)
            want = (0.125 + 0.875 * above).view(2, 3).float()
            torch.testing.assert_close(budget(retention), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(budget(0.1), torch.full((2, 3), 0.1))  # below the floor: equal shares


@pytest.mark.parametrize("kind", STATIC)
def test_tables_of_heads_of_several_lengths(kind: str) -> None:
    """What is protected is there first, as far as it is there; more than all is all."""
    lengths = torch.tensor([[3, 40, 10, 0], [40, 40, 12, 5], [1, 2, 90, 40]])
    budget, sure = trained(kind), lengths.clamp(max=12)
    for total in (int(sure.sum()), 150, 250, int(lengths.sum()), int(lengths.sum()) + 9):
        table = budget.table(total, lengths, protected=12)
        assert int(table.sum()) == min(total, int(lengths.sum()))
        assert (table >= sure).all() and (table <= lengths).all()
    few = budget.table(20, lengths, protected=12)
    assert int(few.sum()) == 20 and (few <= sure).all()


class Given(nn.Module):
    """Logits that no MLP made."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self) -> Tensor:
        return self.logits


@pytest.mark.parametrize("kind", ["capped", "softmax"])
def test_gradient_of_the_shares(kind: str) -> None:
    budget, weights = trained(kind, 1.0), torch.rand(3, 4)
    budget.logits = Given(budget.logits().detach())
    (budget(0.15) * weights).sum().backward()
    logits, step = budget.logits.logits, 1e-2
    with torch.no_grad():
        for i, j in ((0, 0), (1, 2), (2, 3)):
            ends = []
            for sign in (1, -1):
                logits[i, j] += sign * step
                ends.append((budget(0.15) * weights).sum())
                logits[i, j] -= sign * step
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope.item() == pytest.approx(logits.grad[i, j].item(), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_protected_rows_make_the_budget(kind: str) -> None:
    budget = trained(kind, 1.0)
    lengths = torch.tensor([60, 41])
    competing = lengths - 12
    scores = torch.randn(3, 2, 4, 48)
    masks = budget.log_masks(scores, torch.tensor([0.4, 0.4]), 0.3, lengths, competing).exp()
    assert masks.shape == scores.shape
    assert (masks[:, 1, :, 29:] == 0).all()
    kept = masks.sum((0, 2, 3)) + 12 * 12
    torch.testing.assert_close(kept, 0.4 * 12 * lengths, rtol=1e-3, atol=1e-2)


def test_a_threshold_gives_more_to_heads_whose_tokens_score_more() -> None:
    budget = HeadBudget(1, 2, "threshold")
    scores = torch.randn(1, 1, 2, 400)
    scores[:, :, 0] += 1
    masks = budget.log_masks(scores, torch.tensor([0.3]), 0.05, torch.tensor([400]), torch.tensor([400])).exp()
    first, second = masks.sum(-1).flatten()
    assert first > 2 * second
    assert (first + second).item() == pytest.approx(240, rel=1e-3)
    with pytest.raises(ValueError, match="a kind with shares"):
        budget(0.3)


@pytest.mark.parametrize("kind", ["capped", "softmax"])
@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_shares_to_begin_with(kind: str, floor: float) -> None:
    """As many numbers as heads come out as they went in, wherever floor and sum allow; other retentions follow."""
    torch.manual_seed(3)
    budget = HeadBudget(9, 10, kind, floor=floor)
    shares = (0.4 * torch.randn(90).exp() * 0.15).clamp(0.03, 0.9).view(9, 10)
    budget.fit(shares)
    torch.testing.assert_close(budget(float(shares.mean())), shares, rtol=0.02, atol=0.002)
    order = shares.flatten().argsort()
    assert (budget(0.4).flatten()[order].diff() > -0.01).all()
    assert all(p.grad is None and p.requires_grad for p in budget.parameters())
    none = torch.full((9, 10), 0.3)
    none[0] = 0.0  # below what every head has
    budget.fit(none)
    got = budget(float(none.mean()))
    assert got[0].max() < floor + 0.002 and got[1:].min() > 0.28


def test_shares_that_nothing_can_begin_with() -> None:
    for kind in ("uniform", "threshold"):
        with pytest.raises(ValueError, match=f"a kind with shares that are learned, got '{kind}'"):
            HeadBudget(1, 2, kind).fit(torch.full((1, 2), 0.5))
    for shares in (torch.full((2, 1), 0.5), torch.tensor([[0.5, 1.5]]), torch.tensor([[0.5, -0.1]])):
        with pytest.raises(ValueError, match=r"expected shares \[N, H\] = \[1, 2\] in \[0, 1\], got"):
            HeadBudget(1, 2).fit(shares)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="expected a kind of capped, softmax"):
        HeadBudget(1, 1, "best")
    with pytest.raises(ValueError, match=r"retention in \(0, 1\]"):
        HeadBudget(1, 1)(0.0)
    with pytest.raises(ValueError, match=r"floor in \[0, 1\)"):
        HeadBudget(1, 1, floor=1.0)
