"""Two ranks with half of the heads each: the answers of one rank, and the same blocks free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
import prometheus_client  # noqa: E402
from compared import compare, prompts  # noqa: E402
from dense import load  # noqa: E402
from engine import BLOCK, SETTINGS, answers, engine, free_blocks, greedy  # noqa: E402
from test_engine_models import random_checkpoint  # noqa: E402

from lkv.vllm.settings import dropped  # noqa: E402

LENGTHS = (40, 65, 128, 200)
OPTIONS: dict[str, Any] = dict(enable_prefix_caching=False, max_num_batched_tokens=160, blocks=600)
TWO: dict[str, Any] = dict(tensor_parallel_size=2, distributed_executor_backend="mp")


def evicted_rows(llm: Any) -> list[float]:
    """Of every rank: what its own counter says."""
    name = "lkv:evicted_rows_total"
    return list(llm.collective_rpc(lambda worker: prometheus_client.REGISTRY.get_sample_value(name)))


def held(llm: Any, text: list[int]) -> list[int]:
    """Blocks that a request has after each step."""
    free, found = free_blocks(llm), []
    llm.llm_engine.add_request(str(len(text)), {"prompt_token_ids": text}, greedy(5))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        found.append(free - free_blocks(llm))
    return found


def test_heads_with_shares_of_their_own(folder: Path, dense: Any) -> None:
    settings = {**SETTINGS, "counts": "head", "shares": [[0.5, 1.5, 0.5, 1.5], [0.25, 1.0, 0.25, 1.0]] * 2}
    with engine(folder, settings, **OPTIONS, **TWO) as llm:
        free = free_blocks(llm)
        compare(dense, prompts(*LENGTHS), settings, answers(llm, prompts(*LENGTHS), greedy(8)))
        drops = [
            dropped(n, 0.5 * share, BLOCK) for n in LENGTHS if n >= 48 for row in settings["shares"] for share in row
        ]
        assert evicted_rows(llm) == [sum(drops) / 2] * 2
        assert free_blocks(llm) == free


def test_a_checkpoint_scores_the_heads_of_a_rank(folder: Path, tmp_path: Path) -> None:
    policy = random_checkpoint(load(folder), tmp_path / "lkv")
    settings = {"policy": policy, "retention": 0.4, "min_prompt": 48, "counts": "layer", "shares": [[0.5], [1.5]] * 2}
    found, blocks = [], []
    for ranks in ({}, TWO):
        with engine(folder, settings, **OPTIONS, **ranks) as llm:
            before = evicted_rows(llm)
            found.append(answers(llm, prompts(*LENGTHS), greedy(8)))
            gone = [after - b for after, b in zip(evicted_rows(llm), before, strict=True)]
            blocks.append((sum(gone), held(llm, prompts(200)[0])))
            assert len(set(gone)) == 1  # as many on each rank
    assert blocks[0] == blocks[1]
    for (one, logprobs), (two, others) in zip(*found, strict=True):
        assert one == two and max(abs(a - b) for a, b in zip(logprobs, others, strict=True)) < 5e-4
