"""A whole model behind lkv.Cache: decoding beside transformers' dense cache, and the memory that a prefill takes."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from statistics import median

import pytest
import torch
from conftest import Bench
from results import Result
from shapes import Shape

pytest.importorskip("transformers")

import decoder
import peak
from transformers import DynamicCache

import lkv

LENGTH = 16384
SHAPE = Shape(LENGTH, heads=decoder.HEADS, dim=decoder.DIM, retention=decoder.RETENTION, dtype=torch.float32)
OP = f"generate {decoder.LAYERS}"
ROUNDS = 300


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_decoding(bench: Bench) -> None:
    """One token: over what is left of the prompt, over all of it, and over next to nothing, which is all but attention.

    The dense cache holds random rows, as many as the prompt has: its time does not depend on them.
    """
    model, ids = decoder.build(LENGTH, bench.device), decoder.prompt(LENGTH, bench.device)
    token = ids[:, :1]
    dense, brief = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for layer in range(decoder.LAYERS):
        rows = torch.randn(1, decoder.HEADS, LENGTH, decoder.DIM, device=bench.device)
        dense.update(rows, rows.clone(), layer)
    model(token, past_key_values=brief)
    with lkv.Cache(model, decoder.POLICY, retention=decoder.RETENTION) as cache:
        model(ids, past_key_values=cache, logits_to_keep=1)
        others = {
            "dense cache": partial(model, token, past_key_values=dense),
            "without rows": partial(model, token, past_key_values=brief),
        }

        step = partial(model, token, past_key_values=cache)
        found = bench.measure(f"{OP} step", "", SHAPE, step, others, 0)
    share = 1 - found.ratios["without rows"] / found.ratios["dense cache"]
    bench.report(replace(found, note=f"attention: {share:.0%} of a step over the dense cache"))


def test_step_beside_a_dense_cache(bench: Bench) -> None:
    """What a step costs beyond one with transformers' `DynamicCache`, per layer: a tiny model on one thread."""
    model = decoder.build_tiny(bench.device)
    prompt = decoder.prompt(64, bench.device)
    ours, dense = lkv.Cache(model, "snapkv", retention=0.5, reserve=4096), DynamicCache(config=model.config)
    model(prompt, past_key_values=ours)
    model(prompt[:, :32], past_key_values=dense)

    def step(cache: object) -> float:
        start = time.perf_counter()
        model(prompt[:, :1], past_key_values=cache)
        if bench.device == "cuda":
            torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pairs = bench.once(lambda: [(step(ours), step(dense)) for _ in range(ROUNDS)])[ROUNDS // 10 :]
    finally:
        torch.set_num_threads(threads)
    more = median(a - b for a, b in pairs) / decoder.LAYERS
    shape = Shape(64, heads=2, dim=8, retention=0.5, dtype=torch.float32)
    bench.report(Result(f"{OP} more", "", str(shape), us=more, rounds=len(pairs), note="per layer, than DynamicCache"))


def test_peak(bench: Bench) -> None:
    """What a prefill takes beyond the same one without a cache, and the layer that this holds as well."""

    # Blocks that malloc keeps after they were freed are no peak: with a fixed threshold they go back at once.
    def prefill(cache: str) -> int:
        return peak.of_a_child("decoder.py", cache, LENGTH, bench.device, MALLOC_MMAP_THRESHOLD_="65536")

    layer = SHAPE.cache_bytes
    ours, none = bench.once(lambda: [prefill("ours"), prefill("none")])
    share = (ours - none + layer) / (decoder.LAYERS * layer)
    bench.report(Result(f"{OP} peak", "", str(SHAPE), share=share, length=LENGTH))
