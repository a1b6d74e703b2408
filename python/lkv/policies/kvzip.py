"""KVzip (arXiv 2505.23416): what a model looks at when it has to repeat the text is what the text is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lkv_ext
from lkv.policies.attention import attention_weights
from lkv.policies.protocol import Observation
from lkv.policies.uniform import uniform_budgets


@dataclass(frozen=True)
class KVzip:
    """The largest attention that any query of a second pass over the same text pays to a row, over a head's group.

    All heads of all layers compete for one total, by these scores. The second pass costs about as much as the first
    one: `lkv.learn.second_pass` runs it.

    Attributes:
        sink: rows at the beginning that every head keeps.
        across: "layers" for the competition of all heads, "heads" within a layer, None for equal budgets.
    """

    sink: int = 4
    across: str | None = "layers"

    needs = frozenset({"queries", "second_pass"})
    window = 0

    def __post_init__(self) -> None:
        if self.across not in ("layers", "heads", None):
            raise ValueError(f"lkv.KVzip: expected across 'layers', 'heads' or None, got {self.across!r}")

    @property
    def scope(self) -> str:
        return "model" if self.across == "layers" else "layer"

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`: in [0, 1]; 0 for rows that no query sees."""
        heads = observation.keys.shape[1]
        return torch.stack([attention_weights(observation, head).amax((1, 2)) for head in range(heads)], 1)

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        if self.across is None:
            return uniform_budgets(lengths, total)
        return lkv_ext.budgets_from_scores(
            scores, total, across=self.across, lengths=lengths, starts=starts, sink=self.sink
        )
