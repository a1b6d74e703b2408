"""LKV-H: how much of the cache every head may keep, learned (arXiv 2605.06676; shapes are our reconstruction).

All kinds map a retention to shares of the heads' lengths, or to masks of the tokens; one set of weights serves every
retention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkv_ext import budgets_from_shares, soft_topk

KINDS = ("capped", "softmax", "threshold", "uniform")


class HeadLogits(nn.Module):
    """An embedding per (layer, KV head), and one MLP for all of them: a number each, zero at first."""

    def __init__(self, layers: int, heads: int, dim: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.shape = (layers, heads)
        self.embedding = nn.Embedding(layers * heads, dim)
        # A number added to all logits changes nothing: there is no last bias.
        first, last = nn.Linear(dim, hidden), nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self) -> Tensor:
        """float32 `[N, H]`."""
        return self.mlp(self.embedding.weight).view(self.shape)


class HeadBudget(nn.Module):
    """Shares of all heads of all layers, whose mean is the retention: of the rows that compete, protected ones apart.

    Args:
        layers, heads: N and KV heads H of the model.
        kind: "capped": `sigmoid((a - nu) / T)` with nu such that the sum is exact, which is the capped simplex as
            `soft_topk` relaxes it; "softmax": softmax of a times the total, what is above a head's length poured over
            the others; "threshold": a is added to the scores of the head, and all tokens of all heads
            compete for the total, so that budgets depend on the input; "uniform": nothing is learned.
        floor: the least share of a head, or the retention where that is less.
        temperature: T of "capped".
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        kind: str = "capped",
        *,
        floor: float = 0.005,
        temperature: float = 1.0,
        dim: int = 32,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"lkv.HeadBudget: expected a kind of {', '.join(KINDS)}, got {kind!r}")
        if not 0 <= floor < 1:
            raise ValueError(f"lkv.HeadBudget: expected floor in [0, 1), got {floor}")
        self.kind, self.floor, self.temperature = kind, floor, temperature
        self.layers, self.heads = layers, heads
        self.logits = None if kind == "uniform" else HeadLogits(layers, heads, dim, hidden)

    @property
    def static(self) -> bool:
        """Whether the shares are known before the scores are."""
        return self.kind != "threshold"

    def bias(self) -> Tensor:
        """float32 `[N, H]`: what "threshold" adds to the scores."""
        if self.logits is None:
            raise ValueError("lkv.HeadBudget: expected a kind that is learned, got 'uniform'")
        return self.logits()

    def forward(self, retention: Tensor | float) -> Tensor:
        """Shares `[..., N, H]` in [0, 1] for retentions `[...]`; their mean over heads and layers is the retention."""
        if not self.static:
            raise ValueError("lkv.HeadBudget: expected a kind with shares, got 'threshold'")
        device = retention.device if isinstance(retention, Tensor) else "cpu"
        retention = torch.as_tensor(retention, dtype=torch.float32, device=device)
        if not ((retention > 0) & (retention <= 1)).all():
            raise ValueError(f"lkv.HeadBudget: expected retention in (0, 1], got {retention.tolist()}")
        count = self.layers * self.heads
        shape = (*retention.shape, self.layers, self.heads)
        if self.logits is None:
            return retention[..., None, None].expand(shape)
        a = self.logits().flatten()
        retention = retention.to(a.device)
        floor = retention.clamp(max=self.floor)
        # What is above the floors is shared out among what heads have above theirs.
        rest = (retention - floor) / (1 - floor)
        rows = a.expand(*retention.shape, count)
        if self.kind == "capped":
            above = soft_topk(rows, rest * count, self.temperature)
        else:
            above = pour(rows.softmax(-1), rest * count)
        return (floor[..., None] + (1 - floor[..., None]) * above).view(shape)

    def fit(self, shares: Tensor, steps: int = 400) -> None:
        """Sets what is learned so that the shares at their own mean as retention are these, for training to go on from.

        Embeddings and MLP are fitted to the logits by Adam; what the floor and the sum leave no way to reach is met as
        near as there is one.

        Args:
            shares: `[N, H]` in [0, 1].

        Raises:
            ValueError: for a kind without shares that are learned, and shares of another shape or out of range.
        """
        if not self.static or self.logits is None:
            raise ValueError(f"lkv.HeadBudget: expected a kind with shares that are learned, got {self.kind!r}")
        if shares.shape != (self.layers, self.heads) or not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(
                f"lkv.HeadBudget: expected shares [N, H] = {[self.layers, self.heads]} in [0, 1], got "
                f"{list(shares.shape)} from {float(shares.min())} to {float(shares.max())}"
            )
        floor = min(self.floor, float(shares.mean()))
        above = ((shares.float() - floor) / (1 - floor)).clamp(min=1e-4, max=1 - 1e-4)
        wanted = (above.logit() * self.temperature if self.kind == "capped" else above.log()).to(self.bias().device)
        wanted = wanted - wanted.mean()  # a number added to all changes nothing
        optimizer = torch.optim.Adam(self.logits.parameters(), lr=2e-2)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-2 * (1 - step / steps)
            got = self.logits()
            loss = ((got - got.mean() - wanted) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def table(self, total: int, lengths: int | Tensor, protected: int = 0) -> Tensor:
        """Rows of every head, int64 `[N, H]` on the host.

        Args:
            total: of all heads together; no more than there are.
            lengths: tokens of a head, an int or int `[N, H]`.
            protected: rows that every head has, of which its share comes on top.
        """
        lengths = torch.as_tensor(lengths, device="cpu").expand(self.layers, self.heads)
        sure = lengths.clamp(max=protected)
        competing = lengths - sure
        rest = min(total - int(sure.sum()), int(competing.sum()))
        if rest <= 0:
            even = torch.ones(lengths.shape, device="cpu")
            return budgets_from_shares(even, total=min(total, int(sure.sum())), lengths=sure)
        return sure + budgets_from_shares(self(rest / int(competing.sum())), total=rest, lengths=competing)

    def log_masks(
        self, scores: Tensor, retention: Tensor, temperature: float, lengths: Tensor, competing: Tensor
    ) -> Tensor:
        """The relaxed eviction as a log-mask on attention.

        Args:
            scores: float32 `[N, B, H, m]`, on the scale of the scorer; the first `competing[b]` compete, the others are
                protected.
            retention: `[B]`, of all tokens.
            temperature: in units of the scores: of a head's deviation where they are standardised, else of a factor e
                in the attention that a row receives.
            lengths, competing: int `[B]`, tokens of the text, and those of them that are not protected.

        Returns:
            `[N, B, H, m]`, log of the share of every token that is kept; with the protected ones they make the budgets.
        """
        layers, batch, heads, m = scores.shape
        # The retention of those that compete, of which a short text has none.
        rest = (retention * lengths - (lengths - competing)) / competing.clamp(min=1)
        if self.static:
            budgets = self(rest.clamp(min=1e-6)).permute(1, 0, 2) * competing[:, None]
            valid = competing[:, None].expand(layers, -1, heads)
            return soft_topk(scores, budgets, temperature, lengths=valid, log=True)
        joint = (scores + self.bias()[:, None, :, None]).permute(1, 3, 0, 2).reshape(batch, -1)
        count = layers * heads * competing
        masks = soft_topk(joint, rest * count, temperature, lengths=count, log=True)
        return masks.view(batch, m, layers, heads).permute(2, 0, 3, 1)


def pour(shares: Tensor, total: Tensor) -> Tensor:
    """`[..., n]` in proportion to shares, of this sum `[...]`, none above 1: the excess goes to the others.

    Differentiable in the shares and the total wherever no share is exactly at the cap.
    """
    capped = torch.zeros_like(shares, dtype=torch.bool)
    for _ in range(shares.shape[-1]):
        free = shares.masked_fill(capped, 0)
        level = (total - capped.sum(-1)) / free.sum(-1).clamp(min=1e-30)
        more = (free * level[..., None] > 1) & ~capped
        if not more.any():
            break
        capped |= more
    return torch.where(capped, 1.0, free * level[..., None])
