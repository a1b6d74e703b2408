"""The cases are worth something: kernels with one line broken fail them. `harness.mutations` has the longer list."""

from __future__ import annotations

import pytest
from harness import build
from harness.mutations import MUTATIONS, caught_by

TRIED = (
    "scan without its closing barrier",
    "sums read before all have added",
    "block ends while its peers read",
    "clusters and dependent launches by the device, not by the code",
    "gather: offsets by plain loads",
    "gather: tables by plain loads",
    "gather: warps go on before one has seen the flags",
    "gather: behind a memset as if behind a select",
    "gather does not wait for the flag",
    "gather ends before the select",
    "gather: payloads as if all rows had one size",
    "last rows of a tile skipped",
    "ties from the end",
    "compact: stored before all have waited",
    "compact: does not wait for the row in the way",
    "fill: copied before the list is complete",
    "fill: emptied while others read the list",
    "append: length written while others read it",
    "attend: K read before it is staged",
    "attend: causal limit one row late",
    "soft top-k: tau read before it has moved",
    "soft top-k: mean read before it is known",
)


@pytest.mark.parametrize("name", TRIED)
def test_mutation_is_caught(name: str) -> None:
    if tool := build.missing_tool():
        pytest.skip(f"the emulator is built with {tool}, which is not installed")
    mutation = next(m for m in MUTATIONS if m.name == name)
    assert caught_by(mutation), f"no case notices: {name}"
