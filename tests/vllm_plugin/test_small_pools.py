"""Pools that are too small: requests wait, are preempted and come back, and say what they would have said alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from compared import check, compare, prompts  # noqa: E402
from engine import SETTINGS, answers, engine, free_blocks, greedy, scheduler  # noqa: E402


@pytest.mark.parametrize("tokens", [64, 4096], ids=["chunks", "at_once"])
def test_preempted_requests(folder: Path, dense: Any, tokens: int) -> None:
    texts = prompts(150, 160, 170)
    options: dict[str, Any] = dict(blocks=19, max_model_len=512, enable_prefix_caching=False)
    with engine(folder, SETTINGS, max_num_batched_tokens=tokens, **options) as llm:
        free, preempted = free_blocks(llm), count_preemptions(llm)
        check(llm, dense, texts, SETTINGS, greedy(150))
        assert preempted and free_blocks(llm) == free


def test_more_requests_at_once(folder: Path, dense: Any) -> None:
    """64 requests where ten prompts fit: as many run at once as what they keep leaves space for."""
    settings = {**SETTINGS, "retention": 0.2}
    texts = prompts(*[128] * 64)
    most = {}
    for name, own in (("evicted", None), ("dense", False)):
        with engine(folder, settings, blocks=41, enable_prefix_caching=False, max_num_batched_tokens=512) as llm:
            most[name] = 0
            sched, free = scheduler(llm), free_blocks(llm)
            step = sched.schedule

            def counted(*args: Any, step: Any = step, sched: Any = sched, name: str = name, **kwargs: Any) -> Any:
                output = step(*args, **kwargs)
                most[name] = max(most[name], len(sched.running))
                return output

            sched.schedule = counted
            found = answers(llm, texts, greedy(24, extra_args={"lkv": own} if own is False else None))
            assert free_blocks(llm) == free
            compare(dense, texts[::8], settings, found[::8], retention=1.0 if own is False else None)
    assert most["dense"] <= 10 and most["evicted"] >= 2 * most["dense"], most


def count_preemptions(llm: Any) -> list[str]:
    """Ids of requests that are preempted from here on."""
    found: list[str] = []
    sched = scheduler(llm)
    preempt = sched._preempt_request

    def noted(request: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(request.request_id)
        return preempt(request, *args, **kwargs)

    sched._preempt_request = noted
    return found
