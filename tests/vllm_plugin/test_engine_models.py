"""LKV's scores in an engine: of random models, Qwen3 among them, whose keys are normed, and of SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from compared import prompts  # noqa: E402
from dense import generate, keys_before_rope, load, save  # noqa: E402
from engine import BLOCK, answers, engine, free_blocks, greedy  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import lkv  # noqa: E402
import lkv_ext  # noqa: E402
from lkv.policies.lkv import checkpoint  # noqa: E402
from lkv.vllm.settings import dropped  # noqa: E402

RETENTION = 0.15
Positions = tuple[Tensor, ...]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Positions]]:
    """Positions of the rows that the engine kept in every head, layer by layer."""
    found: list[Positions] = []
    evict = lkv_ext.evict

    def noted(k: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = evict(k, *args, **kwargs)
        found.append(out.positions.long().split(out.lengths.flatten().tolist()))
        return out

    monkeypatch.setattr(lkv_ext, "evict", noted)
    yield found


def random_checkpoint(model: Any, folder: Path) -> str:
    torch.manual_seed(1)
    design, shape = checkpoint.Design(hidden=8), checkpoint.Shape.of(model)
    checkpoint.save(folder, design.build(shape), design, shape, {})
    return str(folder)


def answer(llm: Any, dense: Any, learned: Any, kept: list[Positions], prompt: list[int], tokens: int) -> dict[str, Any]:
    """What the engine says and keeps, and what the dense model says that keeps the same rows, with its own scores."""
    kept.clear()
    [(said, logprobs)] = answers(llm, [prompt], greedy(tokens))
    gaps = []

    def keep(layer: int, keys: Tensor, values: Tensor) -> Tensor:
        features = torch.cat([before[layer], values[None]], -1)
        valid = torch.ones(features.shape[:3], dtype=torch.bool)
        scores = learned.token_scorer(layer, features, valid)[0]
        mask = mask_of(kept[layer], len(prompt))
        inner = slice(learned.sink, len(prompt) - learned.window)
        assert mask[:, : inner.start].all() and mask[:, inner.stop :].all()
        freed = len(prompt) - mask.sum(1)
        assert (freed % BLOCK == 0).all()
        settings = llm.llm_engine.vllm_config.additional_config["lkv"]
        if settings.get("counts", "equal") == "equal":
            assert (freed == dropped(len(prompt), settings["retention"], BLOCK)).all() and freed.any()
        worst = scores[:, inner].masked_fill(~mask[:, inner], torch.inf).amin(1)
        best = scores[:, inner].masked_fill(mask[:, inner], -torch.inf).amax(1)
        gaps.append(((best - worst) / scores.std(1)).max())
        return mask

    with keys_before_rope(dense) as before:
        theirs = generate(dense, prompt, tokens, keep, forced=said)[1]
    greedy_tokens = generate(dense, prompt, tokens, lambda layer, keys, values: mask_of(kept[layer], len(prompt)))[0]
    return {
        "tokens": said, "theirs": greedy_tokens, "error": (torch.tensor(logprobs) - torch.tensor(theirs)).abs(),
        "gap": float(max(gaps)),
    }  # fmt: skip


def mask_of(positions: Positions, tokens: int) -> Tensor:
    """bool `[H, tokens]`."""
    return torch.stack([torch.zeros(tokens, dtype=torch.bool).index_fill(0, rows, True) for rows in positions])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scores_of_a_checkpoint(family: str, kept: list[Positions], tmp_path: Path) -> None:
    """No row is kept that has a lower score in the dense model than one that is not, to rounding."""
    dense = load(save(tmp_path / "model", family))
    policy = random_checkpoint(dense, tmp_path / "lkv")
    settings = {"policy": policy, "retention": 0.4, "min_prompt": 48}
    with engine(tmp_path / "model", settings, enable_prefix_caching=False, max_num_batched_tokens=96) as llm:
        free = free_blocks(llm)
        for prompt in prompts(97, 200):
            found = answer(llm, dense, lkv.load(policy, dense), kept, prompt, 8)
            assert found["tokens"] == found["theirs"]
            assert found["error"].max() < 5e-4 and found["gap"] < 1e-4, found
        assert free_blocks(llm) == free


@pytest.fixture(scope="module")
def text(smollm2: Path) -> list[int]:
    page = Path(__file__).parents[2] / "README.md"
    return list(AutoTokenizer.from_pretrained(smollm2)(page.read_text()).input_ids)


def test_smollm2(smollm2: Path, text: list[int], kept: list[Positions]) -> None:
    dense = load(smollm2)
    settings = {"policy": "smollm2", "retention": RETENTION}
    with engine(smollm2, settings, enable_prefix_caching=False, max_num_batched_tokens=512) as llm:
        free = free_blocks(llm)
        found = answer(llm, dense, lkv.load("smollm2", dense, any_weights=True), kept, text[:800], 16)
        print("fp32", found)
        assert found["tokens"] == found["theirs"]
        assert found["error"].max() < 1e-3 and found["gap"] < 1e-3, found
        assert free_blocks(llm) == free


def test_smollm2_with_a_share_for_every_head(smollm2: Path, text: list[int], kept: list[Positions]) -> None:
    dense = load(smollm2)
    settings = {"policy": "smollm2-fixed", "retention": RETENTION, "counts": "head"}
    with engine(smollm2, settings, enable_prefix_caching=False, max_num_batched_tokens=512, blocks=6000) as llm:
        free = free_blocks(llm)
        found = answer(llm, dense, lkv.load("smollm2-fixed", dense, any_weights=True), kept, text[:800], 16)
        counts = torch.tensor([[len(rows) for rows in layer] for layer in kept])
        print("a share for every head", found, counts)
        assert counts.unique().numel() > 4 and counts.sum() < (RETENTION + 0.03) * counts.numel() * 800
        assert found["tokens"] == found["theirs"]
        assert found["error"].max() < 1e-3 and found["gap"] < 1e-3, found
        assert free_blocks(llm) == free


def test_smollm2_in_bfloat16(smollm2: Path, text: list[int], kept: list[Positions]) -> None:
    """As far from float32 as the engine without eviction is."""
    dense, prompt = load(smollm2), text[:800]
    settings = {"policy": "smollm2", "retention": RETENTION}
    options: dict[str, Any] = dict(enable_prefix_caching=False, max_num_batched_tokens=512, dtype="bfloat16")
    with engine(smollm2, settings, **options) as llm:
        found = answer(llm, dense, lkv.load("smollm2", dense, any_weights=True), kept, prompt, 16)
        [(said, logprobs)] = answers(llm, [prompt], greedy(16, extra_args={"lkv": False}))
    theirs = generate(dense, prompt, 16, None, forced=said)[1]
    without = (torch.tensor(logprobs) - torch.tensor(theirs)).abs()
    print("bf16", found, without)
    assert found["error"].mean() < 2 * without.mean() + 0.02
