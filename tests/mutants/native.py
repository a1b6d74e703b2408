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
    guards: tuple[str, ...]  # the folders and files that decide whether it is noticed, beside the source
    caught_by: Callable[[], str | None]
    equivalent: str = ""  # why no test can notice
    lacks: str = ""  # what this machine does not have, without which no test here can notice


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
    sources = sorted(x for pattern in ("*.cpp", "*.h", "*.txt") for x in build.EMULATOR.glob(pattern))
    parts = [*sources, build.EMULATOR / "include", build.EMULATOR / "harness"]  # what the cases are run by
    guards = tuple(x.relative_to(ROOT).as_posix() for x in parts)
    for mutation in mutations.MUTATIONS:
        file = (build.KERNELS / mutation.file).relative_to(ROOT).as_posix()
        yield Native(mutation.name, file, guards, partial(mutations.caught_by, mutation), mutation.equivalent)


LISTS: tuple[Callable[[], Iterable[Native]], ...] = (built, emulated)


def judge(minutes: float, filed: Sequence[Path] = ()) -> Iterator[Result]:
    """A result for every mutant of every list: an earlier one, also of a filed run, as for those of Python."""
    store = results.Store(ROOT / results.FILE, *filed)
    begun = time.monotonic()
    for native in (x for each in LISTS for x in each()):
        key = hashlib.sha256(f"{native.file} {native.name}".encode()).hexdigest()[:12]
        digest = partial(results.digest, ROOT, native.file)
        new = Result(key, AREA, results.NOT_RUN, "", f"{native.file}: {native.name}")
        if native.equivalent:
            yield replace(new, state=results.EQUIVALENT, by=native.equivalent)
        elif known := store.known(new, digest, native.guards):
            yield known
        elif native.lacks or time.monotonic() - begun > minutes * 60:
            yield replace(new, by=native.lacks)
        else:
            start = time.monotonic()
            how = native.caught_by()
            state = results.SURVIVED if how is None else results.KILLED
            new = replace(new, state=state, by=how or "", seconds=round(time.monotonic() - start, 1))
            new = replace(new, digest=digest(results.decisive(new, native.guards)))
            store.add(new)
            print(results.line(new), flush=True)
            yield new
