"""Runs cases in a process of its own: `python -m harness.worker LIBRARY SUITE FIRST COUNT SCHEDULES VARIANT`.

Exits with 1 at the first difference. A kernel that touches memory it must not, or that gets stuck, ends the process in
another way: the caller counts that as a failure too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from harness import append, attend, compact, evict, soft_topk
from harness.device import Emulator, Schedule
from harness.params import Tuning

SUITES: dict[str, Callable[[Emulator, int, Schedule], None]] = {
    "evict": evict.run,
    "compact": compact.run,
    "append": append.run,
    "attend": attend.run,
    "soft_topk": soft_topk.run,
}


def main(library: str, suite: str, first: int, count: int, names: list[str], variant: int) -> int:
    emulator = Emulator(library)
    if suite == "evict":
        emulator.configure(Schedule(names[0]), Tuning())
        try:
            evict.check_upload(emulator)
            evict.check_no_segments(emulator)
            evict.check_words_of_an_old_driver(emulator)
            evict.check_questions(emulator, first, Schedule(names[0]))
        except (AssertionError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1
        emulator.free_all()
    for seed in range(first, first + count):
        draw = np.random.default_rng((seed, variant))
        for name in names:
            resident, capability = int(draw.choice([1, 3, 8, 16, 64])), int(draw.choice([80, 90, 90]))
            code = int(draw.choice([80, capability, capability]))
            schedule = Schedule(name, int(draw.integers(2**32)), resident, capability, code)
            try:
                SUITES[suite](emulator, seed, schedule)
            except (AssertionError, RuntimeError) as error:
                print(f"case {seed}, {schedule}: {error}", file=sys.stderr)
                return 1
            emulator.free_all()
    return 0


if __name__ == "__main__":
    path, what, start, cases, schedules, variant = sys.argv[1:]
    sys.exit(main(path, what, int(start), int(cases), schedules.split(","), int(variant)))
