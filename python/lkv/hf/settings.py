"""How much a cache keeps: the arguments of `lkv.Cache`, checked, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from lkv.policies import NEEDS, Policy
from lkv.policies.uniform import rows_kept

OBSERVED = NEEDS - {"second_pass"}  # needs that the adapter can meet


@dataclass(frozen=True)
class Settings:
    """See `lkv.Cache`; all numbers of rows are per head, on average over the heads of a layer."""

    policy: Policy
    retention: float | None
    budget: int | None
    chunks: str
    cap: int | None
    interval: int
    reserve: int
    observe: frozenset[str]
    observe_window: int

    def __post_init__(self) -> None:
        def expect(condition: bool, expected: str, got: object) -> None:
            if not condition:
                raise ValueError(f"lkv.Cache: expected {expected}, got {got}")

        given = [name for name in ("retention", "budget") if getattr(self, name) is not None]
        expect(len(given) < 2, "one of retention and budget", "both")
        expect(len(given) == 1 or self.cap is not None, "retention, budget or cap", "none of them")
        expect(self.retention is None or 0 < self.retention <= 1, "retention in (0, 1]", self.retention)
        expect(self.budget is None or self.budget >= 1, "budget >= 1", self.budget)
        expect(self.chunks in ("each", "last"), "chunks 'each' or 'last'", repr(self.chunks))
        expect(self.reserve >= 1, "reserve >= 1", self.reserve)
        if self.cap is not None:
            expect(1 <= self.interval < self.cap, f"interval in [1, cap) = [1, {self.cap})", self.interval)
        expect(self.observe_window >= 1, "observe_window >= 1", self.observe_window)
        unknown = self.observe - OBSERVED
        expect(not unknown, f"observe of at most {_names(OBSERVED)}", _names(unknown))

    def check_needs(self) -> None:
        """Raises ValueError where the policy cannot score, as something that it needs is not observed."""
        missing = self.policy.needs - self.observe
        if missing:
            way = f"make the cache with observe={sorted(missing)}" if missing <= OBSERVED else "pass scores= to evict"
            raise ValueError(
                f"lkv.Cache: expected a policy that needs only what is observed, {_names(self.observe) or 'nothing'}, "
                f"got one that needs {_names(missing)}: {way}"
            )
        if "queries" in self.policy.needs and self.policy.window > self.observe_window:
            raise ValueError(
                f"lkv.Cache: expected a policy of a window of at most the observed {self.observe_window} queries, got "
                f"{self.policy.window}: make the cache with observe_window={self.policy.window}"
            )

    def target(self, length: int) -> int:
        """Rows per head to keep of a prompt or turn, given the logical length of the sequence, padding not counted."""
        if self.retention is not None:
            rows = rows_kept(length, self.retention)
        else:
            rows = length if self.budget is None else self.budget
        return rows if self.cap is None else min(rows, self.cap)


def _names(words: frozenset[str]) -> str:
    return ", ".join(sorted(words))
