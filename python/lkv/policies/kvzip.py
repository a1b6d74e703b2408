"""KVzip (arXiv 2505.23416): what a model looks at when it has to repeat the text is what the text is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lkv_ext
from lkv.policies.attention import attention_weights
from lkv.policies.base import check_ends
from lkv.policies.protocol import Observation
from lkv.policies.uniform import uniform_budgets


@dataclass(frozen=True)
class Repetition:
    """How a text is repeated in a second pass.

    Attributes:
        chunk: tokens that are repeated at a time.
        lead: tokens before a chunk, from the second one on, that tell the model where it is.
        first, later: tokens that ask for the first chunk, and for a later one, before its lead. Models that go on with
            what they have seen need none. suffix: tokens between the request and the chunk.
        sink: the first rows, which take part in the softmax of every chunk.
    """

    chunk: int = 2000
    lead: int = 8
    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    sink: int = 4

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("lead", 0), ("sink", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"lkv.KVzip: expected {name} >= {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class KVzip:
    """The largest attention that any query of a second pass over the same text pays to a row, over a head's group.

    The text is repeated in chunks. The softmax of a chunk is over its rows, the first rows of the text and the tokens
    of the repetition up to the query, as in the authors' code. All heads of all layers compete for one total, by these
    scores. `lkv.compress` runs the second pass, which costs more than the first one.

    Attributes:
        sink: rows at the beginning that every head keeps.
        across: "layers" for the competition of all heads, "heads" within a layer, None for equal budgets.
        repetition: how the text is repeated. The authors' words for it are those of a tokenizer: give one to
            `lkv.compress`.
    """

    sink: int = 4
    across: str | None = "layers"
    repetition: Repetition = Repetition()

    needs = frozenset({"queries", "second_pass"})
    window = 0
    nonnegative = True

    def __post_init__(self) -> None:
        check_ends(self)
        if self.across not in ("layers", "heads", None):
            raise ValueError(f"lkv.KVzip: expected across 'layers', 'heads' or None, got {self.across!r}")

    @property
    def scope(self) -> str:
        return "model" if self.across == "layers" else "layer"

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float32 `[B, H, L]`: in [0, 1]; 0 for rows that no query sees. What `lkv.second_pass` computes faster."""
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
