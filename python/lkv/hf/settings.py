"""How much a cache keeps: the arguments of `lkv.Cache`, checked, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from lkv.policies import Policy

SUPPORTED = frozenset({"queries"})  # needs that the adapter can meet


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

    def __post_init__(self) -> None:
        def expect(condition: bool, says: str, got: object) -> None:
            if not condition:
                raise ValueError(f"lkv.Cache: expected {says}, got {got}")

        given = [name for name in ("retention", "budget") if getattr(self, name) is not None]
        expect(len(given) < 2, "one of retention and budget", "both")
        expect(len(given) == 1 or self.cap is not None, "retention, budget or cap", "none of them")
        expect(self.retention is None or 0 < self.retention <= 1, "retention in (0, 1]", self.retention)
        expect(self.budget is None or self.budget >= 1, "budget >= 1", self.budget)
        expect(self.chunks in ("each", "last"), "chunks 'each' or 'last'", repr(self.chunks))
        expect(self.reserve >= 1, "reserve >= 1", self.reserve)
        if self.cap is not None:
            expect(1 <= self.interval < self.cap, f"interval in [1, cap) = [1, {self.cap})", self.interval)
        expect(self.policy.scope == "layer", "a policy of scope 'layer'", repr(self.policy.scope))
        missing = self.policy.needs - SUPPORTED
        expect(not missing, f"a policy that needs at most {', '.join(SUPPORTED)}", ", ".join(sorted(missing)))

    def target(self, length: int) -> int:
        """Rows per head to keep of a prompt or turn, given the logical length of the sequence, padding not counted."""
        if self.retention is not None:
            rows = max(1, round(self.retention * length))
        else:
            rows = length if self.budget is None else self.budget
        return rows if self.cap is None else min(rows, self.cap)
