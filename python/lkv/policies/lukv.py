"""LU-KV (arXiv 2602.08585): how much every head may keep, by curves that were found before for a model and scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
import torch
from torch import Tensor

import lkv_ext
from lkv.policies.base import LayerWrapper, Protect
from lkv.policies.expected_attention import ExpectedAttention
from lkv.policies.protocol import Policy

STEPS = 99


@dataclass(frozen=True, eq=False)
class Curves:
    """Share that every head loses, float64 `[99, N, H]`, where all of them lose 1, 2, ... 99 % on average."""

    lost: Tensor

    def __post_init__(self) -> None:
        if self.lost.dim() != 3 or len(self.lost) != STEPS or not bool(((self.lost >= 0) & (self.lost <= 1)).all()):
            raise ValueError(f"lkv.LUKV: expected curves [99, N, H] in [0, 1], got {list(self.lost.shape)}")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Curves:
        """Reads a .npy file in the layout of the authors and of kvpress. Raises ValueError for another."""
        try:
            return cls(torch.from_numpy(np.load(path, allow_pickle=False)).double())
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"lkv.LUKV: expected a .npy file of curves [99, N, H] in {path}: {error}") from None

    def save(self, path: str | PathLike[str]) -> None:
        with open(path, "wb") as file:
            np.save(file, self.lost.numpy())

    @classmethod
    def fit(cls, texts: Iterable[tuple[Tensor, Tensor]], sink: int = 4, window: int = 1) -> Curves:
        """From what a policy said of the rows of some texts, and of what use they were later: the mean over the texts.

        A head loses its rows from the worst score up, and with a row its use. What a head loses is made convex (the
        lower hull of the sums), and the head that loses the least gives the next row, whichever layer it is of.

        Args:
            texts: of each text the scores `[N, H, L]` and the use `[N, H, L]` of its rows, such as the attention that
                they receive from what comes behind the text.
            sink, window: rows at both ends that stay.
        """
        found = [_of_a_text(scores.double(), use.double(), sink, window) for scores, use in texts]
        if not found:
            raise ValueError("lkv.LUKV: expected a text or more to fit curves to, got none")
        return cls(torch.stack(found).mean(0))

    def kept(self, retention: float) -> Tensor:
        """float64 `[N, H]`: shares that heads keep, linear between the steps."""
        at = (1 - retention) * (STEPS + 1) - 1  # 0: one per cent is lost
        whole = torch.cat([torch.zeros_like(self.lost[:1]), self.lost])
        low = min(max(int(at + 1), 0), STEPS)
        high, part = min(low + 1, STEPS), at + 1 - low
        return 1 - (whole[low] + (whole[high] - whole[low]) * part)


@dataclass(frozen=True)
class LUKV(LayerWrapper):
    """Every head keeps what its curve says at the retention of all; the scorer says which rows.

    kvpress makes the rows of each layer whole and takes the nearest step; here the total over all layers is exact, by
    largest remainder, and curves are linear between their steps. Heads keep their protected rows.

    Attributes:
        scorer: the one that the curves were found for.
        curves: `Curves.load(path)`, or `lkv.offline.budget_curves(model, texts, scorer)`; of the layers that are
            evicted.
    """

    scorer: Policy = field(default_factory=lambda: Protect(ExpectedAttention(epsilon=0.02), window=1))
    curves: Curves | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curves is None:
            raise ValueError("lkv.LUKV: expected curves, got none: lkv.policies.lukv.Curves.load reads a file")

    @property
    def layers(self) -> int:
        assert self.curves is not None
        return self.curves.lost.shape[1]

    def ahead(self, layer: int, rows: Tensor, lengths: Tensor) -> Tensor:
        """int64 `[B, H]` of one layer; see `Ahead`."""
        return torch.stack([self.budget_table(*p)[layer] for p in zip(rows.tolist(), lengths.tolist(), strict=True)])

    def budget_table(self, rows: int, length: int) -> Tensor:
        """int64 `[N, H]`: rows of every head, `rows` on average."""
        assert self.curves is not None
        shares = self.curves.kept(rows / max(length, 1)).clamp(min=0)
        sure = min(rows, self.sink + self.window, length)
        return lkv_ext.budgets_from_shares(shares, total=rows * shares.numel(), lengths=length, floor=sure)


def _of_a_text(scores: Tensor, use: Tensor, sink: int, window: int) -> Tensor:
    """float64 `[99, N, H]`."""
    layers, heads, length = scores.shape
    end = length - window
    if use.shape != scores.shape or end <= sink:
        raise ValueError(
            f"lkv.LUKV: expected scores and use [N, H, L] with L > {sink + window}, got {list(scores.shape)} and "
            f"{list(use.shape)}"
        )
    order = scores[..., sink:end].argsort(dim=-1, stable=True)  # the worst first
    costs = _convex(use[..., sink:end].gather(-1, order)).flatten(0, 1)
    # Of what is lost at 99 %, a head keeps one per cent at least.
    most = length - max(round(0.01 * length), sink + window)
    costs = costs[:, :most]
    owners = torch.arange(len(costs), device="cpu").repeat_interleave(costs.shape[1])
    givers = owners[costs.flatten().argsort(stable=True)]
    lost, done = torch.zeros(len(costs), dtype=torch.float64, device="cpu"), 0
    steps = []
    for step in range(1, STEPS + 1):
        until = min(round(step / 100 * layers * heads * length), len(givers))
        lost += torch.bincount(givers[done:until], minlength=len(lost))
        done = until
        steps.append((lost / length).view(layers, heads))
    return torch.stack(steps)


def _convex(costs: Tensor) -> Tensor:
    """`[..., n]` that do not fall, with the largest sums below those of the given: the slopes of their lower hull."""
    rows = []
    for values in costs.flatten(0, -2).tolist():
        means: list[tuple[float, int]] = []  # of neighbours that are pooled, and how many
        for value in values:
            mean, count = value, 1
            while means and means[-1][0] >= mean:
                before, more = means.pop()
                mean, count = (mean * count + before * more) / (count + more), count + more
            means.append((mean, count))
        rows.append([mean for mean, count in means for _ in range(count)])
    return torch.tensor(rows, dtype=torch.float64, device="cpu").view(costs.shape)
