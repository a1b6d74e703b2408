"""`python -m mutants`: see the package."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from . import __doc__ as about
from . import catalog, judge, native, results

ROOT = Path(__file__).resolve().parents[2]


AREA_HELP = f"of these areas only; {native.AREA}: the lists of C++ and CUDA, which are not sampled"


def main() -> int:
    options = _parse()
    os.environ |= {"HYPOTHESIS_PROFILE": "small", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    chosen = _choose(options)
    if options.list:
        print(*chosen, sep="\n")
        return 0
    if options.entries:
        store = results.Store(ROOT / results.FILE, results.FILED)
        print(*(results.as_entry(x) for x in chosen if store.state(x.key) == results.SURVIVED), sep="\n")
        return 0
    filed = () if options.anew else (results.FILED,)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that copies and tests are put away
    with _alone(ROOT / "build/mutants"):
        found = list(
            judge.judge(ROOT, chosen, options.workers, options.minutes, options.survivors, options.skip_clean, filed)
        )
        of_lists = list(native.judge(options.minutes, filed)) if native.AREA in (options.area or ()) else []
    print(results.summary([*found, *of_lists]), flush=True)
    if options.keep:
        results.keep([*found, *of_lists], options.area or catalog.AREAS)
    missed = any(x.state == results.SURVIVED for x in of_lists)  # each was written because something must notice it
    return 0 if results.share(found) >= results.ENOUGH and not missed else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutants", description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--area", nargs="*", choices=[*catalog.AREAS, native.AREA], help=AREA_HELP)
    parser.add_argument("--files", nargs="*", metavar="PATTERN", help="of files that match one of these")
    parser.add_argument("--count", type=int, default=390, help="mutants in all (default 390)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no mutant after this time")
    parser.add_argument("--workers", type=int, default=2, help="tests at once, of one thread each (default 2)")
    parser.add_argument("--skip-clean", action="store_true", help="do not run the tests without a mutant: they pass")
    parser.add_argument("--survivors", action="store_true", help="only those of the sample that survived last time")
    parser.add_argument("--anew", action="store_true", help="try what is filed as well")
    parser.add_argument("--keep", action="store_true", help="file the results, in the place of those of the same areas")
    parser.add_argument("--entries", action="store_true", help="print survivors as entries of equivalent/ and end")
    parser.add_argument("--list", action="store_true", help="print the mutants of the sample and end")
    options = parser.parse_args()
    if options.keep and (options.files or options.survivors):
        parser.error("--keep: expected whole areas, got --files or --survivors")
    return options


def _choose(options: argparse.Namespace) -> list[catalog.Mutant]:
    files = [x for x in catalog.sources(ROOT) if not options.area or catalog.area_of(x) in options.area]
    if options.files:
        files = [x for x in files if any(fnmatch(x, pattern) for pattern in options.files)]
    if not files and (options.files or options.area != [native.AREA]):
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


if __name__ == "__main__":
    sys.exit(main())
