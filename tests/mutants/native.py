"""Mutants of C++ and CUDA: lists of changes to a line, kept beside the tests that notice them.

A list is a function of LISTS. It returns its mutants, each with a function that builds the mutated sources, runs the
tests and says how they failed, or returns None where nothing noticed.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import results
from .results import Result

ROOT = Path(__file__).resolve().parents[2]
AREA = "csrc"


@dataclass(frozen=True)
class Native:
    name: str
    file: str  # the mutated source, from the root of the tree
    guards: tuple[Path, ...]  # the folders and files that decide whether it is noticed, beside the source
    caught_by: Callable[[], str | None]
    equivalent: str = ""  # why no test can notice


def built() -> Iterator[Native]:
    """C++ sources, built and tried by the tests of the ops."""
    from . import built

    return built.mutants()


def emulated() -> Iterator[Native]:
    """CUDA kernels in the emulator."""
    sys.path.insert(0, str(ROOT / "tests/emulator"))
    from harness import build, mutations

    if tool := build.missing_tool():
        raise RuntimeError(f"the emulator is built with {tool}, which is not installed")
    for mutation in mutations.MUTATIONS:
        file = (build.KERNELS / mutation.file).relative_to(ROOT).as_posix()
        yield Native(
            mutation.name, file, (ROOT / "tests/emulator",), partial(mutations.caught_by, mutation), mutation.equivalent
        )


LISTS: tuple[Callable[[], Iterable[Native]], ...] = (built, emulated)


def judge(minutes: float, filed: Sequence[Path] = ()) -> Iterator[Result]:
    """A result for every mutant of every list: an earlier one, also of a filed run, as for those of Python."""
    store = results.Store(ROOT / results.FILE, *filed)
    begun = time.monotonic()
    for native in (x for each in LISTS for x in each()):
        key = hashlib.sha256(f"{native.file} {native.name}".encode()).hexdigest()[:12]
        digest = _digest(ROOT / native.file, *native.guards)
        new = Result(key, AREA, results.NOT_RUN, "", f"{native.file}: {native.name}", digest)
        if native.equivalent:
            yield replace(new, state=results.EQUIVALENT, by=native.equivalent)
        elif known := store.known(new):
            yield known
        elif time.monotonic() - begun > minutes * 60:
            yield new
        else:
            start = time.monotonic()
            how = native.caught_by()
            state = results.SURVIVED if how is None else results.KILLED
            new = replace(new, state=state, by=how or "", seconds=round(time.monotonic() - start, 1))
            store.add(new)
            print(results.line(new), flush=True)
            yield new


def _digest(*tops: Path) -> str:
    both = hashlib.sha256()
    for top in tops:
        for path in sorted(x for x in ((top,) if top.is_file() else top.rglob("*")) if x.is_file()):
            if path.suffix != ".pyc":
                both.update(path.read_bytes())
    return both.hexdigest()[:16]
