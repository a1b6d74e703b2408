"""What became of mutants: written as it comes, so that a run goes on where the last one ended; filed, and summed up."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

from . import catalog

KILLED, TIMED_OUT, SURVIVED, EQUIVALENT, NOT_RUN = "killed", "timed out", "survived", "equivalent", "not run"
EQUIVALENTS = Path(__file__).parent / "equivalent"
FILE = "build/mutants/results.jsonl"
FILED = Path(__file__).parent / "verdicts.jsonl"  # of a whole run: what is judged again is what has changed since
ENOUGH = 0.95  # of the mutants that are not equivalent


@dataclass(frozen=True)
class Result:
    key: str  # of the mutant
    area: str
    state: str
    by: str  # the test that noticed, or the reason on file why none can
    mutant: str  # for readers
    digest: str = ""  # of the source and the tests that decided
    seconds: float = 0.0


class Store:
    """Results of earlier runs and of this one, which go into the first of these files. A later result holds."""

    def __init__(self, path: Path, *filed: Path) -> None:
        self.path = path
        self._of: dict[str, list[Result]] = defaultdict(list)
        for each in (x for file in (*filed, path) for x in read(file)):
            self._of[each.key].append(each)

    def known(self, new: Result, digest: Callable[[Iterable[str]], str], tests: Sequence[str]) -> Result | None:
        """The last result of the same mutant, source and tests; `digest` is of the source and these tests."""
        held = (x for x in reversed(self._of[new.key]) if x.digest == digest(decisive(x, tests)))
        return next(held, None)

    def state(self, key: str) -> str:
        return self._of[key][-1].state if self._of[key] else NOT_RUN

    def add(self, result: Result) -> None:
        self._of[result.key].append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(_line_of_json(result))


def decisive(result: Result, tests: Sequence[str]) -> Sequence[str]:
    """Of the tests that were run, the file that noticed: others may change. All, where none did."""
    noticed = [x for x in tests if result.state in (KILLED, TIMED_OUT) and result.by.split("::")[0] == x]
    return noticed or tests


def read(path: Path) -> list[Result]:
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def keep(found: Sequence[Result], areas: Iterable[str], path: Path = FILED) -> None:
    """Files what was tried of these areas, in the place of what was filed of them."""
    tried = [x for x in found if x.state in (KILLED, TIMED_OUT, SURVIVED)]
    others = [x for x in read(path) if x.area not in set(areas)]
    path.write_text("".join(map(_line_of_json, sorted([*others, *tried], key=lambda x: (x.area, x.mutant, x.key)))))


def _line_of_json(result: Result) -> str:
    return json.dumps(asdict(result)) + "\n"


def digest(root: Path, source: str, tests: Iterable[str]) -> str:
    """A digest of what decides a mutant's fate, except the rest of the package: the same digest, the same result.

    Of a test that is a folder, all of its files.
    """
    both = hashlib.sha256()
    for file in (source, *tests):
        top = root / file
        for path in sorted(x for x in ((top,) if top.is_file() else top.rglob("*")) if x.is_file()):
            if path.suffix != ".pyc":
                both.update(path.read_bytes())
    return both.hexdigest()[:16]


def equivalents(folder: Path = EQUIVALENTS) -> dict[tuple[str, str, str, str, int], str]:
    """The reason why a mutant behaves as the original, by file, function, lines before and after, and number."""
    reasons = {}
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text()).get("equivalent", ()):
            if not entry.get("reason"):
                raise ValueError(f"{path.name}: a mutant of {entry['file']} has no reason: {entry['after']!r}")
            texts = (entry[x].strip() for x in ("file", "where", "before", "after"))
            reasons[(*texts, entry.get("nth", 0))] = entry["reason"]
    return reasons


def identity(mutant: catalog.Mutant) -> tuple[str, str, str, str, int]:
    return mutant.file, mutant.where, mutant.before, mutant.after, mutant.nth


def as_entry(mutant: catalog.Mutant) -> str:
    """The lines that file a mutant as equivalent, save for the reason."""
    nth = f"nth = {mutant.nth}\n" if mutant.nth else ""
    texts = "".join(f"{x} = {_toml(getattr(mutant, x))}\n" for x in ("file", "where", "before", "after"))
    return f'[[equivalent]]\n{texts}{nth}reason = ""\n'


def _toml(text: str) -> str:
    return f"'''\n{text}'''" if "\n" in text or "'" in text else f"'{text}'"


def line(result: Result) -> str:
    return f"{result.state:9} {result.seconds:5.1f} s  {result.mutant}\n    {result.by}"


def share(results: Iterable[Result]) -> float:
    counts = Counter(x.state for x in results)
    noticed = counts[KILLED] + counts[TIMED_OUT]
    tried = noticed + counts[SURVIVED]
    return noticed / tried if tried else 1.0


def summary(results: Iterable[Result]) -> str:
    """A table of areas, and the survivors."""
    areas: dict[str, list[Result]] = defaultdict(list)
    for each in results:
        areas[each.area].append(each)
    every = [x for area in areas.values() for x in area]
    states = (KILLED, TIMED_OUT, SURVIVED, EQUIVALENT, NOT_RUN)
    rows = [f"{'area':10}" + "".join(f"{x:>12}" for x in (*states, "noticed"))]
    for name, group in (*sorted(areas.items()), ("all", every)):
        counts = Counter(x.state for x in group)
        rows.append(f"{name:10}" + "".join(f"{counts[x]:12}" for x in states) + f"{share(group):11.1%}")
    survivors = [f"survived: {x.mutant}" for x in every if x.state == SURVIVED]
    return "\n".join((*survivors, "", *rows))
