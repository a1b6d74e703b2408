"""LKV-T: what a token is worth to a head, from its own key and value alone (arXiv 2605.06676; our reconstruction)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUTS = ("kv", "hidden")
SCALES = ("standard", "absolute")
CHUNK = 16384  # tokens whose hidden activations are in memory at once, where no gradient is needed


class TokenScorer(nn.Module):
    """A two-layer MLP for every head of every layer; all heads of a layer are one batched matmul.

    Args:
        layers, heads: N and KV heads H of the model.
        features: width of the input: D + Dv for "kv", the model's width for "hidden".
        input: "kv": the key before RoPE and the value of the head; "hidden": what the attention of the layer reads.
        hidden: width of the MLP.
        scale: "standard": the scores of a head have mean 0 and deviation 1 over a text, so that they rank its rows and
            say nothing of other heads; "absolute": they are what the MLP gives plus a number of the head, for
            regression on the logarithm of attention, and are compared over heads and layers as they are.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, layers: int, heads: int, features: int, input: str = "kv", hidden: int = 64, scale: str = "standard"
    ) -> None:
        super().__init__()
        if input not in INPUTS:
            raise ValueError(f"lkv.TokenScorer: expected an input of {', '.join(INPUTS)}, got {input!r}")
        if scale not in SCALES:
            raise ValueError(f"lkv.TokenScorer: expected a scale of {', '.join(SCALES)}, got {scale!r}")
        self.input, self.layers, self.heads, self.features, self.scale = input, layers, heads, features, scale
        self.register_buffer("mean", torch.zeros(layers, heads, features))
        self.register_buffer("deviation", torch.ones(layers, heads, features))
        self.up = nn.Parameter(torch.randn(layers, heads, features, hidden) * features**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(layers, heads, hidden))
        self.down = nn.Parameter(torch.randn(layers, heads, hidden) * hidden**-0.5)
        # Standardised scores have no mean.
        self.offset = nn.Parameter(torch.zeros(layers, heads)) if scale == "absolute" else None

    def forward(self, layer: int, features: Tensor, valid: Tensor) -> Tensor:
        """Scores of one layer, on the scale of the scorer.

        Args:
            features: `[B, H, n, F]` ("hidden": `[B, 1, n, F]`), any floating dtype.
            valid: bool `[B, H, n]`.

        Returns:
            float32 `[B, H, n]`; 0 outside the valid tokens.
        """
        return self.scaled(self.raw(layer, features), valid)

    def scaled(self, raw: Tensor, valid: Tensor) -> Tensor:
        """Scores of what `raw` gives, `[B, H, n]`: 0 outside the valid tokens."""
        return standardise(raw, valid) if self.scale == "standard" else raw.masked_fill(~valid, 0)

    def raw(self, layer: int, features: Tensor) -> Tensor:
        """float32 `[B, H, n]`: the output of the MLP."""
        if features.shape[-1] != self.features or features.shape[1] not in (1, self.heads):
            raise ValueError(
                f"lkv.TokenScorer: expected features [B, {self.heads}, n, {self.features}], got {list(features.shape)}"
            )
        pieces = features.split(features.shape[2] if torch.is_grad_enabled() else CHUNK, 2)
        return torch.cat([self._piece(layer, piece) for piece in pieces], 2)

    def _piece(self, layer: int, features: Tensor) -> Tensor:
        # The standardised input, (x - mean) / deviation, is folded into the first matmul.
        parts = (self.up, self.up_bias, self.down, self.mean, self.deviation)
        up, up_bias, down, mean, deviation = (part[layer].to(features.device) for part in parts)
        up = up / deviation[..., None]
        bias = up_bias - (mean[:, None] @ up)[:, 0]
        hidden = F.silu(features.float() @ up + bias[:, None])
        out = (hidden @ down[..., None])[..., 0]
        return out if self.offset is None else out + self.offset[layer].to(out.device)[:, None]

    @torch.no_grad()
    def fit_input(self, moments: Tensor) -> None:
        """Takes mean and deviation of the input from the summed `moments` of a sample, float64 `[N, H, 1 + 2 F]`."""
        count, total, squares = moments.split([1, self.features, self.features], -1)
        mean = total / count
        self.mean.copy_(mean)
        self.deviation.copy_((squares / count - mean**2).clamp(min=1e-6).sqrt())


def moments(features: Tensor, valid: Tensor) -> Tensor:
    """For one layer, float64 `[H, 1 + 2 F]`: number of valid rows, their sum and the sum of their squares.

    Args:
        features: `[B, H, n, F]`, or with a single head for all. valid: bool `[B, H, n]`.
    """
    rows = features.double() * valid[..., None]
    parts = (valid.double()[..., None], rows, rows * features.double())
    return torch.cat([part.sum((0, 2)) for part in parts], -1)


def standardise(scores: Tensor, valid: Tensor) -> Tensor:
    """`[..., n]` of mean 0 and deviation 1 over the valid ones, the others 0."""
    weights = valid.to(scores.dtype)
    count = weights.sum(-1, keepdim=True).clamp(min=1)
    centred = (scores - (scores * weights).sum(-1, keepdim=True) / count) * weights
    return centred / ((centred**2).sum(-1, keepdim=True) / count + 1e-6).sqrt()
