"""The methods that are compared, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

from torch import nn

from lkv import policies
from lkv.policies import Policy
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv import Learned
from lkv.policies.lkv import learned as with_budget
from lkv.policies.lkv.head_budget import HeadBudget
from lkv.policies.snapkv import SnapKV

FULL, FLOOR = "full", "floor"  # all rows; the protected ones alone
ALIASES = {"streaming": "streaming_llm"}  # names that reports had before


@dataclass(frozen=True)
class Method:
    """A policy under a name. `policy` None is the full cache."""

    name: str
    policy: Policy | None

    @property
    def scorer(self) -> Policy | None:
        """Whose scores they are."""
        inner = getattr(self.policy, "scorer", None)
        return inner if isinstance(inner, Policy) else self.policy

    @property
    def second_pass(self) -> bool:
        return self.policy is not None and "second_pass" in self.policy.needs

    def retentions(self, given: Sequence[float]) -> Sequence[float]:
        """Those at which there is something to evaluate."""
        return (1.0,) if self.name == FULL else given

    @property
    def identity(self) -> str:
        """What the policy is, its settings and a digest of its weights: the same in every process."""
        return identity(self.policy)


def identity(value: object) -> str:
    """See `Method.identity`."""
    if isinstance(value, nn.Module):
        plain = {name: x for name, x in vars(value).items() if isinstance(x, str | int | float) and name[0] != "_"}
        digest = hashlib.sha256()
        for name, tensor in sorted(value.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        plain.pop("training")
        return f"{type(value).__name__}({plain}, {digest.hexdigest()[:16]})"
    if is_dataclass(value):
        parts = (f"{field.name}={identity(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__name__}({', '.join(parts)})"
    if hasattr(value, "__dict__"):  # a policy of another package
        parts = (f"{name}={identity(x)}" for name, x in sorted(vars(value).items()))
        return f"{type(value).__module__}.{type(value).__name__}({', '.join(parts)})"
    return repr(value)


def heuristics() -> dict[str, Policy]:
    """The methods that need no training, by their names in `lkv.policies`, those of other packages included."""
    return {name: policies.get(name) for name in policies.names()}


def learned(lkv: Learned, variants: Mapping[str, Learned] | None = None) -> dict[str, Policy]:
    """LKV, and the grid of {uniform, LKV-H} x {SnapKV, KVzip, LKV-T}.

    Args:
        variants: further checkpoints by name: "lkv-t" trained with equal budgets, "threshold" and so on. The shares of
            LKV-H are those of `lkv`, or of the first variant where budgets of `lkv` depend on the text. Without any,
            the grid has equal budgets alone.
    """
    more = dict(variants or {})
    uniform = HeadBudget(lkv.budget.layers, lkv.budget.heads, "uniform")
    snapkv, kvzip = SnapKV(), KVzip(across=None)
    grid: dict[str, Policy] = {
        "lkv": lkv,
        "uniform+lkv-t": with_budget(lkv.scorer, uniform, lkv.sink, lkv.window),
        "uniform+kvzip": kvzip,
    }
    shares = next((x for x in (lkv, *more.values()) if x.budget.static and x.budget.kind != "uniform"), None)
    if shares is not None:
        grid["lkv-h+snapkv"] = replace(shares, scorer=snapkv, sink=snapkv.sink, window=snapkv.window)
        grid["lkv-h+kvzip"] = replace(shares, scorer=kvzip, sink=kvzip.sink, window=kvzip.window)
    return grid | more


def choose(names: list[str], known: Mapping[str, Policy]) -> list[Method]:
    """Methods by their names.

    Raises:
        ValueError: for a name that is not known, or a learned method without a checkpoint.
    """
    methods = []
    for name in (ALIASES.get(name, name) for name in names):
        if name not in known and name not in (FULL, FLOOR):
            raise ValueError(f"lkv eval: expected methods of {', '.join([FULL, FLOOR, *known])}, got {name!r}")
        methods.append(Method(name, known.get(name)))
    return methods
