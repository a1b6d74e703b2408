"""What policies are made of: scorers, and wrappers that change one thing of another policy.

A policy answers three questions. Which rows are worth more (`score`), how many every head keeps (`budgets`), and which
stay whatever their scores (`sink`, `window`). A scorer answers the first, gives all heads the same, and protects what
its method does. A wrapper holds a policy as `scorer` and answers one question anew:

    AdaKV(SnapKV())                             # budgets: the heads of a layer compete
    PyramidKV(AdaKV(SnapKV()))                  # layers first, then the heads of each
    AdaKV(CAOTE(SnapKV(window=16)))             # scores, then budgets
    AdaKV(Protect(KNorm(), sink=64, window=8))  # what stays

Scores and protection come inside of budgets: a budget rule has to know both. Everything is a frozen dataclass, so that
`dataclasses.replace`, `==`, `repr` and files of caches work, and an ablation grid is a list comprehension.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lkv.policies.protocol import Accumulates, Ahead, Layered, Observation, Policy, Refines, Weighs
from lkv.policies.uniform import uniform_budgets


class Scorer:
    """A policy that only scores: all heads of a layer keep the same number of rows.

    Attributes:
        nonnegative: scores are weights, such as attention: no less than 0, and comparable between the rows of a head.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[str] = "layer"
    nonnegative: ClassVar[bool] = False

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        return uniform_budgets(lengths, total)

    def __post_init__(self) -> None:
        check_ends(self)


@dataclass(frozen=True)
class Wrapper:
    """A policy over another one, of which it is what it does not change.

    Attributes:
        scorer: the other policy, of scope "layer".
    """

    scorer: Policy

    def __post_init__(self) -> None:
        if self.scorer.scope != "layer":
            raise ValueError(
                f"lkv.{type(self).__name__}: expected a scorer of scope 'layer', got {self.scorer.scope!r}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return self.scorer.needs

    @property
    def scope(self) -> str:
        return "layer"

    @property
    def nonnegative(self) -> bool:
        return getattr(self.scorer, "nonnegative", False)

    @property
    def sink(self) -> int:
        return self.scorer.sink

    @property
    def window(self) -> int:
        return self.scorer.window

    def score(self, layer: int, observation: Observation) -> Tensor:
        return self.scorer.score(layer, observation)

    def budgets(
        self, scores: Tensor | Sequence[Tensor], lengths: Tensor, total: Tensor, *, starts: Tensor | None = None
    ) -> Tensor:
        return self.scorer.budgets(scores, lengths, total, starts=starts)


@dataclass(frozen=True)
class ScoreWrapper(Wrapper):
    """One that changes scores or protection, and so comes inside of those that make budgets known ahead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_ahead(self, f"put {type(self).__name__} inside of it")


@dataclass(frozen=True)
class LayerWrapper(Wrapper):
    """One that divides a total among the layers; the policy inside divides what a layer has among its heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_ahead(self, "one of them can divide the total")


@dataclass(frozen=True)
class ImportanceWrapper(LayerWrapper):
    """One that divides a total by what is measured of each layer while a prompt is read: see `Weighs`."""

    @property
    def scope(self) -> str:
        return "model"

    @property
    def slack(self) -> int:
        """Rows of a head by which rounding may raise its budget as later layers arrive, for scope "cascade"."""
        return 4

    @abstractmethod
    def importance(self, layer: int, observation: Observation, scores: Tensor) -> Tensor: ...

    @abstractmethod
    def divide(self, importance: list[float], total: int, lengths: Tensor) -> Tensor:
        """Rows that every layer keeps of one sequence, over all its heads: int64 `[N]`, of this sum.

        Args:
            importance: of each layer.
            total: over all layers, no more than there is.
            lengths: int64 `[N, H]`, valid rows, on the host.
        """

    def budgets(
        self,
        scores: Tensor | Sequence[Tensor],
        lengths: Tensor,
        total: Tensor,
        *,
        starts: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Tensor:
        """int64 `[N, B, H]`; one synchronisation on CUDA.

        Args:
            starts: `[B, H]`, or `[N, B, H]`.
            importance: float32 `[N, B]`, of all layers.
        """
        if importance is None:
            raise ValueError(f"lkv.{type(self).__name__}: expected the importance of all layers, got none")
        there, found = lengths.cpu(), importance.T.tolist()
        wanted = torch.minimum(total.cpu(), there.sum((0, 2))).tolist()
        totals = torch.stack(
            [self.divide(*each, there[:, b]) for b, each in enumerate(zip(found, wanted, strict=True))], 1
        )
        begin = [starts] * len(lengths) if starts is None or starts.dim() == 2 else list(starts)
        each_layer = zip(scores, lengths, totals, begin, strict=True)
        return torch.stack([self.scorer.budgets(s, n, t, starts=first) for s, n, t, first in each_layer])


@dataclass(frozen=True)
class Protect(ScoreWrapper):
    """Keeps more rows at both ends than a policy does: a system prompt, or recent tokens for a method that keeps none.

    Attributes:
        sink, window: first and last rows of every head that stay, inside its budget; at least those of the scorer.
    """

    sink: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ends(self)
        for name in ("sink", "window"):
            object.__setattr__(self, name, max(getattr(self, name), getattr(self.scorer, name)))

    def score(self, layer: int, observation: Observation) -> Tensor:
        """The scorer sees as many queries as without protection."""
        if "all_queries" not in self.needs:
            observation = observation.last_queries(max(self.scorer.window, 1))
        return self.scorer.score(layer, observation)


def refuse_second_pass(policy: Wrapper) -> None:
    """For wrappers whose scores are made of the scorer's while rows are observed, which a second pass does not do."""
    if "second_pass" in policy.scorer.needs:
        raise ValueError(
            f"lkv.{type(policy).__name__}: expected a scorer that scores while a text is read, got {policy.scorer}"
        )


def _refuse_ahead(policy: Wrapper, remedy: str) -> None:
    if isinstance(policy.scorer, (Ahead, Layered)):
        raise ValueError(
            f"lkv.{type(policy).__name__}: expected a policy whose budgets are not known ahead, got "
            f"{type(policy.scorer).__name__}: {remedy}"
        )


def refiner(policy: object) -> Refines | None:
    """The one that chooses rows once budgets are known: a policy or what it wraps. None: rows go by their scores."""
    while not isinstance(policy, Refines):
        policy = getattr(policy, "scorer", None)
        if policy is None:
            return None
    return policy


def accumulator(policy: object) -> Accumulates | None:
    """The one whose sums go on from eviction to eviction: a policy or what it wraps. None: there are none."""
    while policy is not None:
        if isinstance(policy, Accumulates) and getattr(policy, "accumulates", True):
            return policy
        policy = getattr(policy, "scorer", None)
    return None


def check_layers(policy: object, count: int) -> None:
    """
    Args:
        count: layers that are evicted.

    Raises:
        ValueError: where the policy, or what it wraps, knows something of each layer (`layers`), of more or fewer.
    """
    while policy is not None:
        known = getattr(policy, "layers", None)
        if known is not None and known != count:
            raise ValueError(
                f"lkv.{type(policy).__name__}: expected a table, curves, gates or statistics of {count} layers, those "
                f"of the model that are evicted, got {known}"
            )
        policy = getattr(policy, "scorer", None)


def treats_heads_alike(policy: Policy) -> bool:
    """Whether all heads of a layer keep as many whatever they score."""
    inner: object = policy
    while not isinstance(inner, Ahead):
        own = getattr(type(inner), "budgets", None)
        if own is not Wrapper.budgets:
            return own is Scorer.budgets
        inner = getattr(inner, "scorer", None)
    return False


def scores_once(policy: Policy) -> bool:
    """Whether its scores are all that it makes of an observation, the same for every budget."""
    return refiner(policy) is None and not isinstance(policy, Weighs) and "budget" not in policy.needs


def ranks_by_score(scores: Tensor, among: Tensor) -> Tensor:
    """int64 `[B, H, L]`: 0 for the best row of a head among some, bool `[B, H, L]`; ties to the lower position.

    Rows that are not among them come behind.
    """
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    if not order.shape[-1]:
        return order
    order = order.gather(-1, (~among).gather(-1, order).byte().argsort(dim=-1, stable=True))  # those of -inf among them
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def check_ends(policy: Scorer | Policy) -> None:
    """Raises ValueError for a `sink` or `window` below 0."""
    for name in ("sink", "window"):
        if getattr(policy, name) < 0:
            raise ValueError(f"lkv.{type(policy).__name__}: expected {name} >= 0, got {getattr(policy, name)}")
