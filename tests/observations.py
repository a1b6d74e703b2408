"""What policies are shown in tests: a dense prefill, alone, padded or beside others, and its attention by loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lkv.policies import Observation, Scorer

B, H, G, D, HIDDEN = 2, 3, 2, 8, 6
# Settings of logits that are nobody's defaults, with as many sinks as there are query heads.
SINKS = [0.3, -1.0, 2.0, 0.0, -math.inf, 5.0]
SETTINGS = {
    "plain": {},
    "scale": dict(scaling=1.3),
    "soft cap": dict(softcap=2.0),
    "sinks": dict(sinks=torch.tensor(SINKS)),
    "all": dict(scaling=1.3, softcap=1.5, sinks=torch.tensor(SINKS)),
}


def observe(
    length: int, window: int, seed: int = 0, batch: int = B, heads: int = H, group: int = G, **settings: object
) -> Observation:
    """A dense prefill without padding: rows, the last queries, hidden states and keys before RoPE."""
    g = torch.Generator().manual_seed(seed)
    keys, values, pre_rope = (torch.randn(batch, heads, length, D, generator=g) for _ in range(3))
    window = min(window, length)
    observed = Observation(
        keys=keys,
        values=values,
        positions=torch.arange(length).expand(batch, heads, length),
        lengths=torch.full((batch, heads), length),
        starts=torch.zeros(batch, heads, dtype=torch.long),
        queries=torch.randn(batch, heads * group, window, D, generator=g),
        query_positions=torch.arange(length - window, length).expand(batch, -1),
        query_mask=torch.ones(batch, window, dtype=torch.bool),
        scaling=0.7,
        hidden_states=torch.randn(batch, length, HIDDEN, generator=g),
        pre_rope_keys=pre_rope,
    )
    return replace(observed, **settings)


def pad(observed: Observation, left: int, right: int = 0, fill: float = 3.0) -> Observation:
    """The same rows `left` places later, as in a padded batch; what pads them is `fill`."""

    def widen(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0, left, right), value=fill)

    batch, heads, length = observed.keys.shape[:3]
    return replace(
        observed,
        keys=widen(observed.keys),
        values=widen(observed.values),
        positions=torch.arange(length + left + right).expand(batch, heads, -1),
        starts=observed.starts + left,
        query_positions=observed.query_positions + left,
        hidden_states=widen(observed.hidden_states),
        pre_rope_keys=widen(observed.pre_rope_keys),
    )


def beside(alone: Sequence[Observation], side: str, fill: float = 3.0) -> Observation:
    """Several as one batch, padded on the left or the right; queries that are missing would see everything."""
    longest = max(o.keys.shape[2] for o in alone)
    window = max(o.queries.shape[2] for o in alone)
    parts = []
    for o in alone:
        missing, less = longest - o.keys.shape[2], window - o.queries.shape[2]
        o = pad(o, *((missing, 0) if side == "left" else (0, missing)), fill)
        lost = dict(mode="constant", value=fill)
        parts.append(
            replace(
                o,
                queries=torch.nn.functional.pad(o.queries, (0, 0, less, 0), **lost),
                query_positions=torch.nn.functional.pad(o.query_positions, (less, 0), value=longest),
                query_mask=torch.nn.functional.pad(o.query_mask, (less, 0)),
            )
        )
    names = [n for n in Observation.__slots__ if isinstance(getattr(parts[0], n), Tensor) and n != "sinks"]
    return replace(parts[0], **{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


def attention_by_loops(o: Observation, b: int, head: int) -> list[list[float]]:
    """What every query of a query head pays to every row, `[w][L]`, one number at a time in float64; no padding."""
    h = head * o.keys.shape[1] // o.queries.shape[1]
    length = o.keys.shape[2]
    weights = []
    for j, q in enumerate(o.queries[b, head].double()):
        seen = [i for i in range(length) if o.positions[b, h, i] <= o.query_positions[b, j]]
        logits = [float(q @ o.keys[b, h, i].double()) * o.scaling for i in seen]
        if o.softcap is not None:
            logits = [o.softcap * math.tanh(x / o.softcap) for x in logits]
        if o.sinks is not None:
            logits.append(float(o.sinks[head]))
        exps = [math.exp(x - max(logits)) for x in logits]
        row = [0.0] * length
        for i, e in zip(seen, exps, strict=o.sinks is None):
            row[i] = e / sum(exps)
        weights.append(row)
    return weights


@dataclass(frozen=True)
class Still:
    """A rotary embedding by angles per position, half of the head against the other."""

    angles: Tensor
    length: int

    def _at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        turned = places[..., None].float() * self.angles
        return turned.cos().repeat(*[1] * places.dim(), 2), turned.sin().repeat(*[1] * places.dim(), 2)

    def undo(self, rows: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self._at(positions[:, None])
        first, second = rows.chunk(2, -1)
        return rows * cos - torch.cat([-second, first], -1) * sin

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        return self._at((self.length + torch.arange(count, device=self.angles.device))[None])


@dataclass(frozen=True)
class Given(Scorer):
    """Scores as they are given."""

    scores: Tensor
    sink: int = 0
    window: int = 0

    nonnegative = True

    def score(self, layer: int, observation: Observation) -> Tensor:
        return self.scores.clone()


def rows_of(keys: Tensor, values: Tensor | None = None, **more: object) -> Observation:
    """One sequence, `[H, L, D]`, no padding."""
    keys = keys[None]
    heads, length = keys.shape[1:3]
    return Observation(
        keys=keys,
        values=keys if values is None else values[None],
        positions=torch.arange(length).expand(1, heads, length),
        lengths=torch.full((1, heads), length),
        starts=torch.zeros(1, heads, dtype=torch.long),
        **more,
    )
