"""C++ sources with one careless mistake each, built and tried by the tests.

`python -m mutants.built [WORD ...]` tries those whose name has all words, `--list` prints them; with PYTHONPATH=tests,
after a build of the project in place.

What a mutant changes is compiled in a copy of the tree, and linked with the objects of the project's own build; the
tests of its suite run on the libraries made so. A mutant whose text is gone, or that does not compile, is an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache, partial
from itertools import groupby
from pathlib import Path

from . import runner, tree
from .built_cpu import CPU
from .built_ops import OPS
from .native import ROOT, Native
from .textual import Mutation

FOLDER = ROOT / "build/mutants/built"
MUTATIONS = (*CPU, *OPS)

_SELECT = ("test_parity.py", "test_planted.py", "test_properties.py", "test_numpy.py", "test_isa.py")
_APPEND = ("test_cache.py", "test_whole_cache.py", "test_cache_steps.py", "test_raw_ops.py")
# For every suite its tests, the most telling ones first: the first failure ends a mutant's run.
SUITES = {
    "planted": ("test_planted.py",),
    "select": _SELECT,
    "isa": ("test_isa.py", "test_planted.py"),
    "threads": ("test_threads.py", "test_numpy.py", "test_torch.py"),
    "scale": ("test_scale.py", "test_layouts.py", "test_overlap.py"),
    "numpy": ("test_call_threads.py", "test_numpy.py", "test_numpy_errors.py", "test_overlap.py"),
    "paged": ("test_paged.py", "test_engine_layouts.py"),
    "append": _APPEND,
    "cpu/append*": _APPEND,
    "cpu/attend*": ("test_attend.py", "test_attend_paged.py"),
    "attend": ("test_attend.py", "test_attend_paged.py", "test_soft_topk.py"),
    "floats": ("test_rounding.py", "test_attend.py", "test_soft_topk.py"),
    "cpu/float_*": ("test_attend.py", "test_soft_topk.py"),
    "*soft_t*": ("test_soft_topk.py", "test_derivatives.py", "test_raw_ops.py", "test_planted.py", "test_fake.py"),
    "cpu/*": _SELECT,
    "include/*": ("test_parity.py", "test_properties.py", "test_numpy.py", "test_scale.py"),
    "host/overlap.cpp": ("test_overlap.py", "test_payloads.py", "test_numpy.py", "test_numpy_errors.py"),
    "host/*": ("test_overlap.py", "test_parity.py", "test_errors.py", "test_raw_ops.py", "test_properties.py",
               "test_attend.py", "test_cache.py", "test_whole_cache.py", "test_payloads.py", "test_numpy.py",
               "test_numpy_errors.py"),
    "torch/*": ("test_raw_ops.py", "test_overlap.py", "test_fake.py", "test_derivatives.py", "test_parity.py",
                "test_torch.py", "test_cache.py", "test_whole_cache.py", "test_attend.py", "test_properties.py"),
}  # fmt: skip


def tests_of(mutation: Mutation) -> tuple[str, ...]:
    names = SUITES.get(mutation.suite) or next(x for pattern, x in SUITES.items() if fnmatch(mutation.file, pattern))
    return tuple(f"tests/{name}" for name in names)


class Build:
    """The objects of the project's own build, and libraries that differ from it by a mutant."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.cmake = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        if not (self.cmake / "build.ninja").exists():
            raise FileNotFoundError(f"{self.cmake} is no build: python setup.py build_ext --inplace makes it")
        cache = (self.cmake / "CMakeCache.txt").read_text()
        self._ninja = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*)$", cache, re.MULTILINE)[1]
        self._call(self._ninja, "-C", str(self.cmake))
        self.tree, self.objects = tree.copy_tree(ROOT, folder / "tree"), folder / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        self._inputs = self._read_inputs()
        self._libraries = [next(self.cmake.glob(x)) for x in ("csrc/torch/_torch.so", "csrc/python/_C.*")]
        self._of_library = {x: self._command(x.relative_to(self.cmake)) for x in self._libraries}
        self.restore()

    def restore(self) -> None:
        """Both libraries without a mutant."""
        for library in self._libraries:
            self._put(library)

    def make(self, mutation: Mutation) -> None:
        """Both libraries in the copy of the tree, with the mutant in them."""
        path = self.tree / "csrc" / mutation.file
        text = path.read_text()
        path.write_text(mutation.apply(text))
        try:
            changed = [x for x, files in self._inputs.items() if f"{ROOT}/csrc/{mutation.file}" in files]
            with ThreadPoolExecutor(2) as pool:
                made = dict(zip(changed, pool.map(self._compile, changed), strict=True))
        finally:
            path.write_text(text)
        linked = [self._link(library, made) for library in self._libraries]
        if not any(linked):
            raise ValueError(f"{mutation.name}: no library is made of {mutation.file}")

    def _link(self, library: Path, made: dict[str, str]) -> bool:
        """With these objects in the place of the project's; in front of an archive, whose own are then not needed."""
        command: list[str] = []
        for word in self._of_library[library]:
            if word.endswith(".a") and not os.path.isabs(word):
                command += [made[x] for x in self._words(word) if x in made]
            command.append(made.get(word, word))
        if not set(made.values()) & set(command):
            self._put(library)
            return False
        path = self.tree / "lkv_ext" / library.name
        path.unlink(missing_ok=True)  # some process may still have it mapped
        command[command.index("-o") + 1] = str(path)
        self._call(*command)
        return True

    def _compile(self, target: str) -> str:
        made = str(self.objects / target.replace("/", "_"))
        parts = [x.replace(f"{ROOT}/csrc", f"{self.tree}/csrc") for x in self._command(target)]
        for option, value in (("-o", made), ("-MF", f"{made}.d")):
            parts[parts.index(option) + 1] = value
        self._call(*parts)
        return made

    def _words(self, target: str | Path) -> list[str]:
        """The commands that make it, one behind the other."""
        done = self._call(self._ninja, "-C", str(self.cmake), "-t", "commands", "-s", str(target))
        return shlex.split(done.splitlines()[-1])

    def _command(self, target: str | Path) -> list[str]:
        """The one of the compiler or linker among these."""
        groups = (list(group) for is_end, group in groupby(self._words(target), "&&".__eq__) if not is_end)
        return next(words for words in groups if "-o" in words)

    def _read_inputs(self) -> dict[str, set[str]]:
        inputs: dict[str, set[str]] = {}
        target = ""
        for line in self._call(self._ninja, "-C", str(self.cmake), "-t", "deps").splitlines():
            if line.startswith("    "):
                inputs[target].add(line.strip())
            elif ":" in line:
                target = line.split(":")[0]
                inputs[target] = set()
        return inputs

    def _put(self, library: Path) -> None:
        path = self.tree / "lkv_ext" / library.name
        path.unlink(missing_ok=True)  # some process may still have it mapped
        path.write_bytes(library.read_bytes())

    def _call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.cmake, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout


@cache
def _build() -> Build:
    build = Build()
    runner.preload(("torch", "numpy", "hypothesis", "hypothesis.strategies"))
    return build


@cache
def _clean(tests: tuple[str, ...]) -> runner.Outcome:
    """The tests without a mutant. Raises RuntimeError where they fail."""
    _build().restore()
    outcome = _run(runner.Job(tests))
    if outcome.result != runner.PASSED:
        raise RuntimeError(f"{outcome.by} fails without any mutant:\n{outcome.output[-4000:]}")
    return outcome


def _run(job: runner.Job) -> runner.Outcome:
    return next(runner.run_all([job], [_build().tree]))


def caught_by(mutation: Mutation, limit: float | None = None) -> str | None:
    """The test that fails, or takes several times its time; None where all pass.

    `limit`: seconds of one test, where it is known that all pass without a mutant.
    """
    tests = tests_of(mutation)
    if limit is None:
        limit = 20 + 5 * _clean(tests).slowest
    _build().make(mutation)
    file = f"csrc/{mutation.file}"
    mutated = mutation.apply((ROOT / file).read_text())  # for the tests that compile a source themselves
    outcome = _run(runner.Job(tests, limit=limit, file=file, text=mutated))
    return None if outcome.result == runner.PASSED else outcome.by or outcome.result


def mutants() -> Iterator[Native]:
    """The list, as `native` tries it."""
    for mutation in MUTATIONS:
        caught = partial(caught_by, mutation)
        lacks = "" if "avx512" not in mutation.file or _has_avx512() else "a CPU with AVX-512"
        yield Native(mutation.name, f"csrc/{mutation.file}", tests_of(mutation), caught, mutation.equivalent, lacks)


def _has_avx512() -> bool:
    return "avx512bw" in Path("/proc/cpuinfo").read_text().split()


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants.built", description="C++ sources with one careless mistake each")
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of the mutants to try (default: all)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these mutants, by their whole names")
    parser.add_argument("--skip-clean", action="store_true", help="do not run the tests without a mutant: they pass")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    options = parser.parse_args()
    os.environ |= {"HYPOTHESIS_PROFILE": "small", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    missed = 0
    for mutation in MUTATIONS:
        chosen = mutation.name in options.only if options.only else all(x in mutation.name for x in options.words)
        if chosen and options.list:
            print(f"{mutation.file}: {mutation.name}")
        elif chosen:
            by = mutation.equivalent or caught_by(mutation, 180.0 if options.skip_clean else None)
            state = "equivalent" if mutation.equivalent else "killed" if by else "SURVIVED"
            print(f"{state:10} {mutation.name:60} {by or ''}", flush=True)
            missed += by is None
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
