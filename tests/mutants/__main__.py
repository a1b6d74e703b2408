"""`python -m mutants`: see the package."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from . import __doc__ as about
from . import catalog, guards, results, runner, tree

ROOT = Path(__file__).resolve().parents[2]
# What most tests import; the rest is learnt from the first clean run.
PRELOADED = ("torch", "numpy", "hypothesis", "hypothesis.strategies", "transformers", "accelerate", "safetensors.torch")


def main() -> int:
    options = _parse()
    os.environ |= {"HYPOTHESIS_PROFILE": "small", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    chosen = _choose(options)
    if options.list:
        print(*chosen, sep="\n")
        return 0
    with _alone(ROOT / "build/mutants"):
        found = list(_judge(chosen, options))
    print(results.summary(found), flush=True)
    return 0 if results.share(found) >= results.ENOUGH else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutants", description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--area", nargs="*", choices=list(catalog.AREAS), help="of these areas only")
    parser.add_argument("--files", nargs="*", metavar="PATTERN", help="of files that match one of these")
    parser.add_argument("--count", type=int, default=390, help="mutants in all (default 390)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no mutant after this time")
    parser.add_argument("--workers", type=int, default=2, help="tests at once, of one thread each (default 2)")
    parser.add_argument("--survivors", action="store_true", help="only those of the sample that survived last time")
    parser.add_argument("--list", action="store_true", help="print the mutants of the sample and end")
    return parser.parse_args()


def _choose(options: argparse.Namespace) -> list[catalog.Mutant]:
    files = [x for x in catalog.sources(ROOT) if not options.area or catalog.area_of(x) in options.area]
    if options.files:
        files = [x for x in files if any(fnmatch(x, pattern) for pattern in options.files)]
    if not files:
        sys.exit("mutants: no source file is of that area and matches that pattern")
    return catalog.sample(ROOT, files, options.count, options.seed)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"mutants: another run uses {folder}")
        yield


def _judge(chosen: list[catalog.Mutant], options: argparse.Namespace) -> Iterator[results.Result]:
    """Results of all mutants, of this run where they are not known yet."""
    store = results.Store(ROOT / "build/mutants/results.jsonl")
    reasons = results.equivalents()
    waiting: dict[tuple[str, ...], list[tuple[catalog.Mutant, results.Result]]] = {}
    for mutant in chosen:
        tests = guards.tests_of(mutant.file)
        new = results.Result(
            mutant.key,
            catalog.area_of(mutant.file),
            results.NOT_RUN,
            "",
            str(mutant),
            results.digest(ROOT, mutant.file, tests),
        )
        known = store.known(mutant.key)
        if reason := reasons.get(results.identity(mutant)):
            yield _with(new, results.EQUIVALENT, reason)
        elif options.survivors and (known is None or known.state != results.SURVIVED):
            continue
        elif known is not None and known.digest == new.digest:
            yield known
        else:
            waiting.setdefault(tests, []).append((mutant, new))
    begun = time.monotonic()

    def is_over() -> bool:
        return time.monotonic() - begun > options.minutes * 60

    left = {new.key: new for group in waiting.values() for _, new in group}
    for result in _run(waiting, options.workers, is_over):
        left.pop(result.key)
        store.add(result)
        print(f"{result.state:9} {result.seconds:5.1f} s  {result.mutant}\n    {result.by}", flush=True)
        yield result
    yield from left.values()


def _run(
    waiting: dict[tuple[str, ...], list[tuple[catalog.Mutant, results.Result]]],
    workers: int,
    is_over: Callable[[], bool],
) -> Iterator[results.Result]:
    if not waiting:
        return
    copies = [tree.copy_tree(ROOT, ROOT / f"build/mutants/tree-{i}") for i in range(max(1, workers))]
    texts = {mutant.file: (ROOT / mutant.file).read_text() for group in waiting.values() for mutant, _ in group}
    runner.preload(PRELOADED)
    jobs: list[runner.Job] = []
    for outcome in runner.run_all([runner.Job(tests, guards.LEFT_OUT) for tests in waiting], copies, is_over):
        if outcome.result != runner.PASSED:
            sys.exit(f"mutants: {outcome.by} fails without any mutant:\n{outcome.output}")
        print(f"clean     {outcome.seconds:5.1f} s  {' '.join(outcome.job.tests)}", flush=True)
        runner.preload(outcome.modules)
        limits = {"limit": 30 + 5 * outcome.seconds, "test_limit": 20 + 5 * outcome.slowest}
        for mutant, new in waiting[outcome.job.tests]:
            text = mutant.apply(texts[mutant.file])
            jobs.append(replace(outcome.job, file=mutant.file, text=text, subject=new, **limits))
    states = {
        runner.PASSED: results.SURVIVED,
        runner.FAILED: results.KILLED,
        runner.TIMED_OUT: results.TIMED_OUT,
    }
    for outcome in runner.run_all(jobs, copies, is_over):
        yield _with(outcome.job.subject, states[outcome.result], outcome.by, outcome.seconds)


def _with(result: results.Result, state: str, by: str, seconds: float = 0.0) -> results.Result:
    return replace(result, state=state, by=by, seconds=round(seconds, 1))


if __name__ == "__main__":
    sys.exit(main())
