"""`lkv policies`: the methods by name, with their scores and budgets, what they need and where they are from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lkv.policies import POLICIES, catalog, names


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("lkv policies", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--markdown", action="store_true", help="as the table of docs/policies.md")
    if parser.parse_args(argv).markdown:
        print(catalog.markdown())
        return 0
    for name, *facts in catalog.rows():
        print(name)
        for column, fact in zip(catalog.COLUMNS[1:], facts, strict=True):
            print(f"    {column:14}{fact}")
    for name in names():
        if name not in POLICIES:
            print(f"{name}\n    of another package")
    return 0
