"""Tries mutants: which are known, which are filed as equivalent, and what the tests say of the rest."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import catalog, guards, results, runner, tree
from .results import Result

# What most tests import; the rest is learnt from the first runs.
PRELOADED = ("torch", "numpy", "hypothesis", "hypothesis.strategies", "transformers", "accelerate", "safetensors.torch")
STATES = {runner.PASSED: results.SURVIVED, runner.FAILED: results.KILLED, runner.TIMED_OUT: results.TIMED_OUT}


def judge(
    root: Path,
    mutants: Sequence[catalog.Mutant],
    workers: int = 2,
    minutes: float = float("inf"),
    survivors: bool = False,
    skip_clean: bool = False,
    filed: Sequence[Path] = (),
) -> Iterator[Result]:
    """A result for every mutant: an earlier or filed one where neither source nor tests have changed since.

    `survivors`: only of those that survived last time. `skip_clean`: the tests are known to pass without a mutant.
    """
    store = results.Store(root / results.FILE, *filed)
    reasons = results.equivalents()
    begun = time.monotonic()
    open_ones: dict[tuple[str, ...], list[tuple[catalog.Mutant, Result]]] = defaultdict(list)
    for mutant in mutants:
        tests = guards.tests_of(mutant.file)
        new = Result(mutant.key, catalog.area_of(mutant.file), results.NOT_RUN, "", str(mutant))
        if reason := reasons.get(results.identity(mutant)):
            yield replace(new, state=results.EQUIVALENT, by=reason)
        elif survivors and store.state(mutant.key) != results.SURVIVED:
            continue
        elif known := store.known(new, partial(results.digest, root, mutant.file), tests):
            yield known
        else:
            open_ones[tests].append((mutant, new))
    left = {new.key: new for group in open_ones.values() for _, new in group}
    for result in _run(root, open_ones, workers, skip_clean, lambda: time.monotonic() - begun > minutes * 60):
        del left[result.key]
        store.add(result)
        print(results.line(result), flush=True)
        yield result
    yield from left.values()


def _run(
    root: Path,
    open_ones: dict[tuple[str, ...], list[tuple[catalog.Mutant, Result]]],
    workers: int,
    skip_clean: bool,
    is_over: Callable[[], bool],
) -> Iterator[Result]:
    if not open_ones:
        return
    copies = [tree.copy_tree(root, root / f"build/mutants/tree-{i}") for i in range(workers)]
    texts = {mutant.file: (root / mutant.file).read_text() for group in open_ones.values() for mutant, _ in group}
    runner.preload(PRELOADED)
    groups = [runner.Job(tests, guards.LEFT_OUT) for tests in open_ones]
    if not skip_clean:
        limits = _limits(sorted({x for group in groups for x in group.tests}), copies, is_over)
        groups = [replace(x, limit=max(limits[y] for y in x.tests)) for x in groups if limits.keys() >= set(x.tests)]
    jobs = (
        replace(group, file=mutant.file, text=mutant.apply(texts[mutant.file]), subject=new)
        for group in groups
        for mutant, new in open_ones[group.tests]
    )
    for outcome in runner.run_all(jobs, copies, is_over):
        runner.preload(outcome.modules)
        job = outcome.job
        new = replace(job.subject, state=STATES[outcome.result], by=outcome.by, seconds=round(outcome.seconds, 1))
        yield replace(new, digest=results.digest(root, job.file, results.decisive(new, job.tests)))


def _limits(tests: Sequence[str], copies: list[Path], is_over: Callable[[], bool]) -> dict[str, float]:
    """Seconds for one test of a file: several times what its slowest takes without a mutant."""
    limits = {}
    for outcome in runner.run_all((runner.Job((x,), guards.LEFT_OUT) for x in tests), copies, is_over):
        if outcome.result != runner.PASSED:
            sys.exit(f"mutants: {outcome.by} fails without any mutant:\n{outcome.output}")
        print(f"clean     {outcome.seconds:5.1f} s  {outcome.job.tests[0]}", flush=True)
        runner.preload(outcome.modules)
        limits[outcome.job.tests[0]] = 20 + 5 * outcome.slowest
    return limits
