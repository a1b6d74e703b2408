"""evict_ beside evict and beside a composition that copies the kept rows back."""

from __future__ import annotations

import contenders
import pytest
import rivals
from bench_evict import evict, moved_bytes
from conftest import Bench
from shapes import Inputs, Shape, make_inputs

import lkv_ext


@pytest.mark.parametrize("length", [8192, 131072])
def test_in_place(bench: Bench, length: int) -> None:
    """Every round evicts what the last one left: the same positions, so the same work."""
    shape = Shape(length)
    whole = make_inputs(shape, bench.device)
    inputs = Inputs(shape, whole.k.clone(), whole.v.clone(), whole.scores)
    budgets = inputs.budgets
    out = lkv_ext.evict(whole.k, whole.v, whole.scores, budgets)
    others = {
        "memcpy": rivals.copy_warm([out.k, out.v]),
        "evict": evict(whole),
        "best, copied back": rivals.best_in_place(inputs),
    }

    others |= bench.admit(lambda: contenders.for_evict_in_place(inputs))

    def subject() -> lkv_ext.RaggedIndex:
        return lkv_ext.evict_(inputs.k, inputs.v, inputs.scores, budgets)

    bench.time("evict_", "warm", shape, subject, others, moved_bytes(shape))
