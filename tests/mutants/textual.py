"""Mutants of C++ and CUDA sources: one textual change each, from the lists of this package and of the emulator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A careless mistake.

    Attributes:
        name: what is wrong.
        file: the source, from `csrc`; those of the emulator from `csrc/cuda`.
        before, after: the text that is replaced, and by what. `nth` says which, where it occurs more than once.
        suite: whose tests notice, where the file does not tell.
        equivalent: why no test can.
    """

    name: str
    file: str
    before: str
    after: str
    nth: int = 0
    suite: str = ""
    equivalent: str = ""

    def apply(self, text: str) -> str:
        """Raises ValueError where the text is gone."""
        parts = text.split(self.before)
        if len(parts) <= self.nth + 1:
            raise ValueError(f"{self.name}: {self.file} has no {self.before!r} number {self.nth}")
        head, tail = parts[: self.nth + 1], parts[self.nth + 1 :]
        return self.before.join(head) + self.after + self.before.join(tail)
