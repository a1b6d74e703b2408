"""Counts that differ over layers, over heads and over both: blocks of layers and of heads are freed apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
import prometheus_client  # noqa: E402
from compared import check, prompts  # noqa: E402
from engine import BLOCK, SETTINGS, engine, free_blocks, greedy  # noqa: E402

from lkv.vllm.settings import dropped  # noqa: E402

LENGTHS = (40, 64, 65, 97, 128, 200, 256)
DESIGNS = {
    "layers": {"counts": "layer", "shares": [[0.5], [1.5], [0.5], [1.5]]},
    "uneven_layers": {"counts": "layer", "shares": [[0.5], [1.5], [1.5], [1.5]]},
    "a_whole_layer": {"counts": "layer", "shares": [[2.0], [0.5], [0.5], [0.5]]},
    "heads": {"counts": "head", "shares": [[0.5, 1.0, 1.5, 2.0]] * 4},
    "layers_and_heads": {"counts": "head", "shares": [[0.5, 1.0, 1.5, 2.0], [0.25, 0.25, 1.0, 0.5]] * 2},
}


def evicted_prompts() -> float:
    return prometheus_client.REGISTRY.get_sample_value("lkv:evicted_prompts_total") or 0.0


@pytest.mark.parametrize("design", DESIGNS)
def test_tokens_and_logprobs(folder: Path, dense: Any, design: str) -> None:
    settings = {**SETTINGS, **DESIGNS[design]}
    with engine(folder, settings, enable_prefix_caching=False, max_num_batched_tokens=160, blocks=1000) as llm:
        free, before = free_blocks(llm), evicted_prompts()
        check(llm, dense, prompts(*LENGTHS), settings, greedy(10))
        least = 0.5 * min(min(row) for row in settings["shares"])
        assert evicted_prompts() - before == sum(n >= 48 and dropped(n, least, BLOCK) > 0 for n in LENGTHS)
        for seed, length in enumerate((30, 65, 190)):  # alone in the batch
            check(llm, dense, prompts(length, seed=seed), settings, greedy(6))
        check(llm, dense, prompts(190), settings, greedy(6, extra_args={"lkv": {"retention": 0.3}}), retention=0.3)
        assert free_blocks(llm) == free


def test_blocks_of_heads_go_back_one_by_one(folder: Path) -> None:
    settings = {**SETTINGS, **DESIGNS["heads"]}
    [text] = prompts(256)
    with engine(folder, settings, enable_prefix_caching=False, blocks=400) as llm:
        free, held = free_blocks(llm), []
        llm.llm_engine.add_request("one", {"prompt_token_ids": text}, greedy(4))
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            held.append(free - free_blocks(llm))
    kept = [int(256 * 0.5 * share) // BLOCK for share in settings["shares"][0]]
    assert held[0] == 4 * 256 // BLOCK
    assert held[1] == sum(kept) + 4  # and a block of each head for what comes
