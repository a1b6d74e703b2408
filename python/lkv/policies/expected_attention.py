"""Expected attention (kvpress; arXiv 2510.00636): what queries that have not come yet would look at."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lkv.policies.attention import evictable, grouped
from lkv.policies.base import Scorer
from lkv.policies.protocol import Observation


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """Queries before RoPE of many texts: mean `[N, Hq, D]` and covariance `[N, Hq, D, D]`, float32.

    `lkv.offline.query_statistics(model, texts)` collects them.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        if self.mean.dim() != 3 or self.covariance.shape != (*self.mean.shape, self.mean.shape[-1]):
            raise ValueError(
                "lkv.QueryStatistics: expected mean [N, Hq, D] and covariance [N, Hq, D, D], got "
                f"{list(self.mean.shape)} and {list(self.covariance.shape)}"
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file in the layout of kvpress: query_mean and query_cov."""
        save_file({"query_mean": self.mean.contiguous(), "query_cov": self.covariance.contiguous()}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> QueryStatistics:
        """Reads what `save` wrote, or the published model.safetensors of kvpress.

        Raises:
            ValueError: for a file of another kind.
        """
        try:
            found = load_file(path)
            return cls(found["query_mean"].float(), found["query_cov"].float())
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"lkv.QueryStatistics: expected a safetensors file with query_mean and query_cov in {path}, {error}"
            ) from None


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Queries before RoPE are taken for normal, with the mean and covariance of those of the text, or of other texts.

    Both are rotated by the mean rotation of the next `future` positions. A row's expected logit is `k mu scale + k' S k
    scale^2 / 2`; the softmax over the rows behind the sink, averaged over the group, plus `epsilon`, times the L2 norm
    of the value, is its score. The first `sink` tokens are left out of all of it. Queries are those since the last
    eviction. Covariances are divided by the number of queries.

    Attributes:
        future: positions that are averaged over.
        sink: first rows that stay.
        covariance, norms: whether the second term, and the norm of values, count.
        epsilon: 0.02 is reported as better beside norms.
        statistics: of other texts. None: of this one.
    """

    future: int = 512
    sink: int = 4
    covariance: bool = True
    norms: bool = True
    epsilon: float = 0.0
    statistics: QueryStatistics | None = None

    window = 0
    nonnegative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1 or self.epsilon < 0:
            raise ValueError(
                f"lkv.ExpectedAttention: expected future >= 1 and epsilon >= 0, got {self.future} and {self.epsilon}"
            )

    @property
    def layers(self) -> int | None:
        return None if self.statistics is None else len(self.statistics.mean)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # depends on the settings
        return frozenset({"rotary"} if self.statistics else {"all_queries", "rotary"})

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`; 0 outside the valid rows and in the sink."""
        rotary = observation.rotary
        if rotary is None:
            raise ValueError("lkv.ExpectedAttention: expected an observation with rotary, got none")
        behind, (batch, heads) = evictable(observation, 0, self.sink), observation.keys.shape[:2]
        if self.statistics is not None:
            device = observation.keys.device
            mean, spread = (
                x[layer].to(device).expand(batch, *x.shape[1:])
                for x in (self.statistics.mean, self.statistics.covariance)
            )
        else:
            mean, spread = self.moments(observation)
        cos, sin = (x.mean(1)[:, None] for x in rotary.next(self.future))  # [B, 1, R]
        mean = turned(mean, cos, sin).unflatten(1, (heads, -1))
        scores = torch.zeros(behind.shape, device=behind.device)
        for head in range(heads):
            keys = observation.keys[:, head].float()
            logits = mean[:, head] @ keys.transpose(1, 2) * observation.scaling
            if self.covariance:
                for g, query_head in enumerate(range(head * mean.shape[2], (head + 1) * mean.shape[2])):
                    # R S R', one side at a time.
                    half = turned(spread[:, query_head], cos, sin).transpose(1, 2)
                    around = turned(half, cos, sin)
                    logits[:, g] += ((keys @ around) * keys).sum(-1) * observation.scaling**2 / 2
            there = behind[:, head, None]
            logits = logits.masked_fill(~there, torch.finfo(torch.float32).min)
            weights = grouped(logits.softmax(-1) * there, "mean") + self.epsilon
            if self.norms:
                weights = weights * torch.linalg.vector_norm(observation.values[:, head].float(), dim=-1)
            scores[:, head] = weights.masked_fill(~behind[:, head], 0)
        return scores

    def moments(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Mean `[B, Hq, D]` and covariance `[B, Hq, D, D]` of the queries before RoPE, behind the sink."""
        rotary, queries = observation.rotary, observation.part("queries")
        places, mask = observation.part("query_positions"), observation.part("query_mask")
        assert rotary is not None
        counted = (mask & (places >= observation.starts[:, :1] + self.sink))[:, None, :, None]
        before = rotary.undo(queries, places).float().masked_fill(~counted, 0)
        count = counted.sum(2).clamp(min=1)
        mean = before.sum(2) / count
        spread = before.new_zeros(*mean.shape, mean.shape[-1])
        if self.covariance:
            centred = (before - mean[:, :, None]).masked_fill(~counted, 0)
            spread = centred.transpose(2, 3) @ centred / count[..., None]
        return mean, spread


def turned(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[B, n, D]` by a rotation `[B, 1, R]`, halves of the first R numbers against each other."""
    rotated = cos.shape[-1]
    part = rows[..., :rotated]
    first, second = part.chunk(2, -1)
    return torch.cat([part * cos + torch.cat([-second, first], -1) * sin, rows[..., rotated:]], -1)
