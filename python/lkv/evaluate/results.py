"""Results of an evaluation on disk, line by line, so that an interrupted one goes on and methods may be added later."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lkv.learn.records import FULL, agreed, write_manifest

FILE = "results.jsonl"
Key = tuple[int, str, float]


class Keyed(Protocol):
    """A result: a dataclass of plain values, one of each key."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> tuple: ...


R = TypeVar("R", bound=Keyed)
K = TypeVar("K", bound=tuple)


@dataclass(frozen=True)
class Cell:
    """One method at one retention on one passage.

    Attributes:
        tokens: of the text that was read; rows: `[N][H]` that were kept of it, counted in the cache. With questions
            that are read before the eviction, sums over one compression for each.
        facts: of each question `kind` of the value and what `lkv.evaluate.forced.Fidelity` has; `greedy`, where it was
            answered freely, in [0, 1].
        continuation: `Fidelity`; None where there is none.
        seconds: of the CPU, for prefill, second_pass, scores and eviction.
    """

    passage: int
    domain: str
    document: str
    method: str
    retention: float
    tokens: int
    rows: list[list[int]]
    facts: list[dict[str, Any]]
    continuation: dict[str, Any] | None
    seconds: dict[str, float]

    @property
    def key(self) -> Key:
        return self.passage, self.method, self.retention

    @property
    def kept(self) -> float:
        """Rows that were kept over those that there were."""
        heads = [rows for layer in self.rows for rows in layer]
        return sum(heads) / (self.tokens * len(heads))


class Results(Generic[R]):
    """The results in a folder.

    Args:
        kind: of the results, such as `Cell`.
        made_with: what all of them depend on.
        methods: what each method is, by name. Others may be added later.

    Raises:
        ValueError: for a folder with results that were made with something else, naming what differs.
    """

    def __init__(
        self, folder: Path, kind: Callable[..., R], made_with: Mapping[str, object], methods: Mapping[str, str]
    ) -> None:
        self.folder, self.path, self.kind = folder, folder / FILE, kind
        manifest = {**made_with, "methods": dict(methods)}
        self._manifest: dict[str, object] | None = agreed(
            folder, manifest, grows=("methods",), command="lkv eval", what="results"
        )
        self.cells: dict[tuple, R] = {}
        if self.path.exists():
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:  # a line that was being written
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
            for number, line in enumerate(whole.splitlines(), 1):
                self._know(self._read(line, number))

    def missing(self, keys: Iterable[K]) -> list[K]:
        return [key for key in keys if key not in self.cells]

    def add(self, cell: R) -> None:
        """Writes a result. The folder belongs to this evaluation from the first one on.

        Raises:
            OSError: where the disk is full; the results before stay.
        """
        try:
            if self._manifest is not None:
                write_manifest(self.folder, self._manifest)
                self._manifest = None
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
        except OSError as error:
            if error.errno not in FULL:
                raise
            message = f"lkv eval: expected free space for results in {self.folder}, got none"
            raise OSError(error.errno, message) from error
        self._know(cell)

    def _read(self, line: bytes, number: int) -> R:
        try:
            return self.kind(**json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(
                f"lkv eval: expected a result in line {number} of {self.path}, got {line[:60]!r}; delete the line"
            ) from None

    def _know(self, cell: R) -> None:
        self.cells[cell.key] = cell
