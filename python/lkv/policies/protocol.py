"""What a policy is: how rows are scored, and how many of them every head may keep.

A policy is an object with the attributes and methods of `Policy`. It holds its settings and nothing of a request: all
that it may look at is the `Observation` of one layer, and the same `score` serves a prefill, a chunk, a later turn and
a cap in the middle of decoding. The caller (`lkv.Cache`) owns the rows, the queries and the bookkeeping.

How other methods fit:

- A cascade (LAVa, CAKE): scope "cascade". After layer l the caller calls `score` for it, and then `budgets` with the
  scores of all rows of layers 0..l, those that are gone included, and `starts` `[N, B, H]`; a layer whose budget shrank
  is evicted again. For budgets that only fall as layers arrive, but for `slack` rows of a head by rounding, and rows of
  the largest scores; else "model". With an attribute `nested` that is True only scores of rows that are left are shown.
- A second pass (KVzip): needs "second_pass", and has a `repetition` that tells how the text comes again. `score` says
  what a chunk's queries make of the rows that they read: `lkv.second_pass` computes it, and takes the maximum over
  chunks. Budgets follow when all scores are there, with scope "model".
- A threshold for the whole model (KVzip, LKV-H): scope "model". When the last layer of a call has attended, `score` is
  called for every layer, and `budgets` once, with the list of their scores, `lengths` `[N, B, H]` and the total of all
  layers; it returns `[N, B, H]`. Before anything is evicted all layers are there in full: scope "layer" holds one.
- Budgets that no score changes (LKV-H): a policy of scope "layer" with a method `ahead` instead of `budgets` knows
  what the heads of a layer keep before later layers have run, as their share of what the whole model keeps.
- Something that is known of every layer (tables, curves, gates): the policy has an attribute `layers`, their number,
  and is refused where more or fewer are evicted. `layer` is the place of a layer among those that are, from 0.
- A total that is divided among the layers first: see `Layered` where it is known before the scores are (PyramidKV), and
  `Weighs` where something is measured of each layer (LAVa, CAKE, SqueezeAttention). Scores that depend on the budget of
  a head (CriticalKV, SAGE-KV, H2O): see `Refines`.
- Sums that go on (H2O, the standard scale of LKV's threshold): see `Accumulates`. The caller keeps them between two
  evictions, those of rows with the rows.
- Hidden states or keys before RoPE: named in `needs`, they arrive as further fields of the observation. Hidden states
  are of tokens, not of rows: `hidden_states[b, positions[b, h, i]]` is that of a row, and a policy that scores tokens
  does so once and gathers the scores by `positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

NEEDS = frozenset(
    {"queries", "all_queries", "hidden_states", "pre_rope_keys", "rotary", "output_projection", "attention_cosine"}
    | {"budget", "second_pass"}
)
SCOPES = ("layer", "model", "cascade")


class Rotation(Protocol):
    """The rotary embedding of a layer."""

    def undo(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Keys or queries `[B, H, n, D]` of tokens at `positions`, int `[B, n]`, as they were before RoPE."""
        ...

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """Cos and sin, float32 `[B, count, R]`, of the tokens that would come next; R numbers of a head are rotated."""
        ...


@dataclass(frozen=True, slots=True)
class Carried:
    """What a policy accumulates of one layer, for `Accumulates`.

    Attributes:
        rows: float32 `[B, H, L, n]`, n numbers for each row. They move with it, and are 0 where a row has just come.
        heads: `[B, H, n]`, numbers for each head.
        scores: `[B, H, L]`, made of the rows on the way, for `score` to use; not kept.
    """

    rows: Tensor | None = None
    heads: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What a policy sees of one layer: its rows, and the last queries.

    The valid rows of a head are `[starts, starts + lengths)`: a dense prefill has left padding, a ragged cache comes
    right-padded (`RaggedCache.padded`). What lies outside is arbitrary, though finite.

    Attributes:
        keys, values: `[B, H, L, D]`, `[B, H, L, Dv]`, in ascending position, keys as cached (after RoPE).
        positions: int `[B, H, L]`, the place of every row in the sequence as appended, padding counted, which within a
            call comes before the tokens.
        lengths, starts: int64 `[B, H]`.
        queries: `[B, Hq, w, D]` of the last w tokens (after RoPE) where the policy needs them; else None. With the need
            "all_queries" those of all tokens since the last eviction, instead.
        query_positions: int `[B, w]`, their places, counted as `positions`: a query sees the rows at or before its own.
        query_mask: bool `[B, w]`, which of them are there: a sequence may have had fewer tokens.
        scaling: of the logits, `queries @ keys * scaling`.
        softcap: logits are `softcap * tanh(logits / softcap)` where it is given.
        sinks: `[Hq]`, a logit for each query head that takes part in the softmax and stands for no row; None: none.
        hidden_states: `[B, P, hidden]` where the policy needs them: what the layer's attention was called with (after
            its norm), of all P tokens appended so far, those of padding and those evicted since included; `positions`
            index them.
        pre_rope_keys: `[B, H, L, D]` where the policy needs them: the keys as they were before RoPE (after a norm of
            keys, if the model has one), to the rounding of the cache.
        output_projection: `[hidden, Hq * Dv]` where the policy needs it: the weight that makes the layer's output of
            what its query heads read.
        rotary: the rotary embedding of the layer, where the policy needs it.
        budget: int64 `[B]`, on the host: rows that a head of this layer will keep on average, or a head of all layers
            with scope "model"; where the policy needs it.
        attention_cosine: float32 `[B]` where the policy needs it: the cosine between the residual stream before the
            attention of the layer and behind it, mean over all tokens so far.
        carried: what `accumulate` has made of this observation and all before, for a policy that `Accumulates`; None:
            the rows are all that there ever was.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor
    starts: Tensor
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    query_mask: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    hidden_states: Tensor | None = None
    pre_rope_keys: Tensor | None = None
    sinks: Tensor | None = None
    output_projection: Tensor | None = None
    attention_cosine: Tensor | None = None
    rotary: Rotation | None = None
    budget: Tensor | None = None
    carried: Carried | None = None

    def part(self, name: str) -> Tensor:
        """A field that is there because the policy needs it. Raises ValueError where it is not."""
        found = getattr(self, name)
        if found is None:
            raise ValueError(
                f"lkv: expected an observation with {name}, got none: name what the policy needs in `needs`"
            )
        return found

    def last_queries(self, count: int) -> Observation:
        """The same with no more than the last `count` queries."""
        if self.queries is None or self.queries.shape[2] <= count:
            return self
        places, mask = self.part("query_positions"), self.part("query_mask")
        last = slice(self.queries.shape[2] - count, None)
        return replace(
            self, queries=self.queries[:, :, last], query_positions=places[:, last], query_mask=mask[:, last]
        )

    def ranks(self) -> Tensor:
        """int64 `[B, H, L]`: 0 for the first valid row of its head; negative, or at least `lengths`, outside."""
        return torch.arange(self.keys.shape[2], device=self.keys.device) - self.starts[..., None]

    def valid(self) -> Tensor:
        """bool `[B, H, L]`."""
        ranks = self.ranks()
        return (ranks >= 0) & (ranks < self.lengths[..., None])


@runtime_checkable
class Policy(Protocol):
    """The protocol. `sink` and `window` rows at the ends of every head are kept whatever their scores (`evict`'s own).

    A policy that is `Ahead` needs no `budgets`.

    Attributes:
        needs: what the observation must hold beside the rows, a subset of `NEEDS`.
        scope: "layer" may evict as soon as a layer is done, "model" after all layers, "cascade" shrinks earlier layers
            as later ones arrive.
        sink, window: the first and last rows of every head that are protected, inside its budget.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def scope(self) -> str: ...

    @property
    def sink(self) -> int: ...

    @property
    def window(self) -> int: ...

    def score(self, layer: int, observation: Observation) -> Tensor:
        """float `[B, H, L]`, higher is kept. Outside the valid rows anything but NaN.

        Args:
            layer: which of the layers that are evicted, from 0; all layers of a model of full attention.
        """
        ...

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        """Rows that every head keeps.

        Args:
            scores: `[B, H, L]`; with scope "model" or "cascade" a list of them, one per layer.
            lengths: int64 `[B, H]` (`[N, B, H]`): valid rows.
            total: int64 `[B]`, on the host: rows of one sequence over all heads (of all layers).
            starts: int64 `[B, H]`, where the valid rows begin, the same in all layers; None: at 0.

        Returns:
            int64 `[B, H]` (`[N, B, H]`). A sequence's budgets sum to its total, or to the rows it has if
            these are fewer.
        """
        ...


@runtime_checkable
class Refines(Protocol):
    """What a policy may have in addition: scores that depend on how many rows a head keeps (CriticalKV, SAGE-KV, H2O).

    Budgets are made of what `score` gives; rows are chosen by what `refine` makes of it.
    """

    def refine(self, layer: int, observation: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """Scores by which the rows of every head are chosen.

        Args:
            observation: what `score` was shown.
            scores: `[B, H, L]`, of `score`.
            budgets: int64 `[B, H]`, rows that every head will keep, protected ones included.

        Returns:
            float `[B, H, L]`. Outside the valid rows anything but NaN.
        """
        ...


@runtime_checkable
class Accumulates(Protocol):
    """What a policy may have in addition: sums over all that ever came, rows that are gone included (H2O).

    It is called once before every eviction, and `score` is given the result as `Observation.carried`. Of policies
    within each other the outermost one accumulates. An attribute `accumulates` that is False turns it off.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def accumulate(self, layer: int, observation: Observation, before: Carried | None) -> Carried:
        """What has been accumulated until now.

        Args:
            observation: what `score` will be shown. Its queries are those since the last eviction; None: none came.
            before: the same as of the last eviction, of the rows that are here; None: there was none.
        """
        ...


@runtime_checkable
class Weighs(Protocol):
    """What a policy of scope "model" may have in addition: a number for every layer (LAVa, CAKE, SqueezeAttention).

    It is called for each layer when the layer has been scored; `budgets` is given all of them as `importance`, float32
    `[N, B]`.
    """

    def importance(self, layer: int, observation: Observation, scores: Tensor) -> Tensor:
        """float32 `[B]`."""
        ...


@runtime_checkable
class Layered(Protocol):
    """What a policy of scope "layer" may have in addition: totals of layers that are known before the scores are.

    `budgets` divides the total of a layer among its heads.
    """

    def layer_rows(self, layers: int, rows: Tensor, lengths: Tensor) -> Tensor:
        """Rows per head of every layer, on average over its heads.

        Args:
            layers: N, those that are evicted.
            rows: int64 `[B]`, on the host: to be kept per head, on average over all layers.
            lengths: int64 `[B]`, on the host: logical lengths, evicted tokens included.

        Returns:
            int64 `[N, B]`, on the host, none above `lengths`. The sum over the layers is `layers * rows`.
        """
        ...


@runtime_checkable
class Ahead(Protocol):
    """What a policy of scope "layer" may have in the place of `budgets`: those that are known before the scores are."""

    def ahead(self, layer: int, rows: Tensor, lengths: Tensor) -> Tensor:
        """Rows that every head of one layer keeps.

        Args:
            rows: int64 `[B]`, on the host: to be kept per head, on average over all heads of all layers.
            lengths: int64 `[B]`, on the host: logical lengths, evicted tokens included.

        Returns:
            int64 `[B, H]`, on the host.
        """
        ...
