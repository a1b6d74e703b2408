"""Equal counts, every head its own rows, prompts in chunks: tokens of the masked dense model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
import prometheus_client  # noqa: E402
from compared import check, prompts  # noqa: E402
from dense import generate  # noqa: E402
from engine import BLOCK, SETTINGS, answers, engine, free_blocks, greedy, scheduler  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402

RETENTIONS = ({"retention": 0.25}, {"retention": 1.0}, False)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    with engine(folder, SETTINGS, enable_prefix_caching=False, max_num_batched_tokens=96) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_leaks(llm: Any) -> Iterator[None]:
    free = free_blocks(llm)
    yield
    assert free_blocks(llm) == free
    assert all(not manager.requests for manager in scheduler(llm).kv_cache_manager.coordinator.single_type_managers)


def test_prompts_around_blocks_and_budgets(llm: Any, dense: Any) -> None:
    texts = prompts(1, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 200, 256, 300)
    check(llm, dense, texts, SETTINGS, greedy(10))


def test_the_eviction_shows(llm: Any, dense: Any) -> None:
    """The dense model without the mask says something else: the comparison can fail."""
    [text] = prompts(200)
    [(tokens, _)] = answers(llm, [text], greedy(16))
    assert tokens != generate(dense, text, 16, None)[0]


@pytest.mark.parametrize("own", RETENTIONS, ids=str)
def test_a_request_of_its_own_retention(llm: Any, dense: Any, own: Any) -> None:
    retention = own["retention"] if own else 1.0
    check(llm, dense, prompts(190, 129), SETTINGS, greedy(10, extra_args={"lkv": own}), retention=retention)


@pytest.mark.parametrize("own", ["off", {"retention": 0}, {"retention": "all"}, {}, {"policy": "knorm"}, True], ids=str)
def test_what_a_request_cannot_say(llm: Any, own: Any) -> None:
    with pytest.raises(VLLMValidationError, match="lkv.vllm: expected extra_args"):
        answers(llm, prompts(60), greedy(1, extra_args={"lkv": own}))


def test_aborted_in_the_middle_of_a_prompt(llm: Any) -> None:
    llm_engine = llm.llm_engine
    [text] = prompts(300, seed=5)
    llm_engine.add_request("aborted", {"prompt_token_ids": text}, greedy(4))
    llm_engine.step()
    [request] = scheduler(llm).running
    assert 0 < request.num_computed_tokens < len(text)
    llm_engine.abort_request(["aborted"], internal=False)
    while llm_engine.has_unfinished_requests():
        llm_engine.step()


def test_a_thousand_short_requests(llm: Any) -> None:
    """One in five is long enough to be evicted."""
    texts = [text for seed in range(200) for text in prompts(*[5 + seed % 30] * 4, 70, seed=seed)]
    assert len(answers(llm, texts, greedy(1))) == len(texts)


def test_blocks_go_back_when_the_prompt_ends(llm: Any) -> None:
    [text] = prompts(256, seed=6)
    llm_engine, free = llm.llm_engine, free_blocks(llm)
    llm_engine.add_request("one", {"prompt_token_ids": text}, greedy(8))
    held = []
    while llm_engine.has_unfinished_requests():
        llm_engine.step()
        held.append(free - free_blocks(llm))
    assert held[2] == 256 // BLOCK  # the third chunk of 96 tokens ends the prompt
    assert set(held[3:-1]) == {128 // BLOCK + 1} and held[-1] == 0


def test_what_was_evicted_is_counted(llm: Any) -> None:
    before = counted()
    answers(llm, prompts(256, 30, seed=7), greedy(3))
    prompts_, blocks, rows, seconds = (b - a for a, b in zip(before, counted(), strict=True))
    assert (prompts_, blocks, rows) == (1, 128 // BLOCK, 128 * 4 * 4)  # four layers of four heads
    assert 0 < seconds < 60


def counted() -> list[float]:
    names = ("evicted_prompts", "freed_blocks", "evicted_rows", "eviction_seconds")
    return [prometheus_client.REGISTRY.get_sample_value(f"lkv:{name}_total") or 0.0 for name in names]
