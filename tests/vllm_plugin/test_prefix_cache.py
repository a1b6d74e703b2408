"""The prefix cache on: requests share what no eviction writes, and say what they would say alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from compared import check, compare, prompts  # noqa: E402
from dense import generate  # noqa: E402
from engine import BLOCK, SETTINGS, answers, engine, free_blocks, greedy, run, scheduler  # noqa: E402
from test_small_pools import count_preemptions  # noqa: E402
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager  # noqa: E402

from lkv.vllm.settings import Settings, dropped  # noqa: E402
from lkv.vllm.spec import EvictedManager, EvictedSpec  # noqa: E402

DESIGNS: dict[str, dict[str, Any]] = {
    "equal": SETTINGS,
    "layers": {**SETTINGS, "counts": "layer", "shares": [[0.5], [1.5], [0.5], [1.5]]},
}


@pytest.fixture(scope="module", params=DESIGNS)
def design(request: pytest.FixtureRequest) -> dict[str, Any]:
    return DESIGNS[request.param]


@pytest.fixture(scope="module")
def llm(folder: Path, design: dict[str, Any]) -> Iterator[Any]:
    with engine(folder, design, max_num_batched_tokens=96, blocks=600, enable_prefix_caching=True) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if "llm" not in request.fixturenames:
        yield
        return
    llm = request.getfixturevalue("llm")
    free = free_blocks(llm)
    yield
    assert free_blocks(llm) == free
    assert all(not manager.requests for manager in scheduler(llm).kv_cache_manager.coordinator.single_type_managers)


def cached_tokens(llm: Any, text: list[int], params: Any) -> int:
    [output] = run(llm, [text], params)
    return int(output.num_cached_tokens)


def test_prefixes_are_shared_as_far_as_nothing_is_written(llm: Any, dense: Any, design: dict[str, Any]) -> None:
    [long] = prompts(450, seed=2)
    texts = [long[:n] for n in (400, 399, 300, 256, 129, 65, 49, 48, 47)] + [long[:200] + long[300:]]
    cached = []
    for text in texts:
        cached.append(cached_tokens(llm, text, greedy(1)))
        compare(dense, [text], design, answers(llm, [text], greedy(6)))
    shares = [share[0] for share in design.get("shares", [[1.0]])]
    for text, hit in zip(texts, cached, strict=True):
        drops = [dropped(len(text), 0.5 * share, BLOCK) if len(text) >= 48 else 0 for share in shares]
        assert all(hit <= drop for drop in drops if drop), (len(text), hit)
    assert cached[0] == 0 and all(n > 0 for n in cached[1:4]), cached


def test_all_at_once(llm: Any, dense: Any, design: dict[str, Any]) -> None:
    [long] = prompts(450, seed=12)
    check(llm, dense, [long[:n] for n in (300, 300, 256, 290, 40, 33)], design, greedy(6))


def test_what_a_request_without_eviction_publishes_is_not_written(llm: Any, dense: Any, design: Any) -> None:
    [long] = prompts(300, seed=4)
    off = greedy(6, extra_args={"lkv": False})
    check(llm, dense, [long], design, off, retention=1.0)  # publishes all of its blocks
    for text in (long[:290], long[:260]):
        check(llm, dense, [text], design, greedy(6))
    check(llm, dense, [long], design, off, retention=1.0)  # reads them again
    assert cached_tokens(llm, long, off) > 0
    own = greedy(6, extra_args={"lkv": {"retention": 0.2}})
    check(llm, dense, [long[:280]], design, own, retention=0.2)
    assert cached_tokens(llm, long[:280], own) == 0
    check(llm, dense, [long], design, off, retention=1.0)


@pytest.mark.parametrize("tokens", [64, 4096], ids=["chunks", "at_once"])
def test_preempted_requests(folder: Path, dense: Any, tokens: int) -> None:
    [long] = prompts(400, seed=8)
    texts = [long[:150], long[:160], long[:64] + long[200:306]]
    options: dict[str, Any] = dict(blocks=19, max_model_len=512, enable_prefix_caching=True)
    with engine(folder, SETTINGS, max_num_batched_tokens=tokens, **options) as llm:
        free, preempted = free_blocks(llm), count_preemptions(llm)
        check(llm, dense, texts, SETTINGS, greedy(150))
        assert preempted and free_blocks(llm) == free


def test_sharing_everything_is_wrong(folder: Path, dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with vLLM's own rules for what is shared, answers change without an error."""
    naive = FullAttentionManager.find_longest_cache_hit.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(EvictedManager, "find_longest_cache_hit", classmethod(naive))

    def publish(self: Any, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        self.requests[request.request_id] = request
        FullAttentionManager.cache_blocks(self, request, num_tokens, *args, **kwargs)

    monkeypatch.setattr(EvictedManager, "cache_blocks", publish)
    [long] = prompts(400, seed=2)
    with engine(folder, SETTINGS, enable_prefix_caching=True) as llm:
        answers(llm, [long[:300]], greedy(2))
        [(tokens, logprobs)] = answers(llm, [long[:400]], greedy(8, extra_args={"lkv": False}))
    expected, theirs = generate(dense, long[:400], 8, None)
    assert tokens != expected or max(abs(a - b) for a, b in zip(logprobs, theirs, strict=True)) > 1e-2


@pytest.mark.parametrize("retention", [0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("block", [16, 32])
def test_reach_is_below_what_any_prompt_of_these_blocks_drops(retention: float, block: int) -> None:
    settings = Settings("knorm", retention, min_prompt=100)
    spec = EvictedSpec(block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32, settings=settings)
    for blocks in range(30):
        lengths = range(blocks * block, (blocks + 1) * block)
        reach = spec.reach(lengths[0], lengths[-1])
        drops = [spec.drops(n, settings.effective(n, None))[0] for n in lengths]
        assert all(reach <= drop for drop in drops if drop)
        assert reach > 0 or min(drops) == 0
        assert any(drops) or reach == lengths[-1]
