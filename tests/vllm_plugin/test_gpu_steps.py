"""Steps of the path for GPUs that go wrong without a word if something is left out: each has its control."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from compared import check, prompts  # noqa: E402
from dense import SIZES, load, save  # noqa: E402
from engine import BLOCK, SETTINGS, engine, free_blocks, greedy, run  # noqa: E402
from gpu_engine import gpu_engine  # noqa: E402
from stand_ins import FlashInfer  # noqa: E402
from test_prefix_cache import cached_tokens  # noqa: E402
from test_small_pools import count_preemptions  # noqa: E402
from vllm.v1.attention.backends import registry  # noqa: E402

from lkv.vllm import backends, gpu, metadata  # noqa: E402
from lkv.vllm.settings import dropped  # noqa: E402

BACKENDS = ["flash_attn-NHD", "flashinfer-NHD", "trtllm-HND"]
UNEVEN = {**SETTINGS, "counts": "layer", "shares": [[0.5], [1.5], [1.5], [1.5]]}  # two groups of layers of one spec


@pytest.mark.parametrize("name", BACKENDS)
def test_preempted_requests(folder: Path, dense: Any, name: str) -> None:
    """Their outputs are read again behind what is kept, in a second batch of the same step."""
    texts = prompts(150, 160, 170)
    options: dict[str, Any] = dict(blocks=19, max_model_len=512, enable_prefix_caching=False)
    with gpu_engine(name, folder, SETTINGS, **options) as llm:
        free, preempted = free_blocks(llm), count_preemptions(llm)
        check(llm, dense, texts, SETTINGS, greedy(150))
        assert preempted and free_blocks(llm) == free


def test_a_second_plan_needs_a_wrapper_of_its_own(folder: Path, dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with FlashInfer("native")():
        from lkv.vllm import flashinfer

    monkeypatch.setattr(flashinfer.Builder, "_other_builder", lambda self: self)
    texts = prompts(150, 160, 170)
    options: dict[str, Any] = dict(blocks=19, max_model_len=512, enable_prefix_caching=False)
    with gpu_engine("flashinfer-NHD", folder, SETTINGS, **options) as llm, pytest.raises(AssertionError):
        check(llm, dense, texts, SETTINGS, greedy(150))


def test_tables_of_other_groups_are_not_put_past_build(
    folder: Path, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata.Evicting, "supports_update_block_table", True)
    with (
        gpu_engine("flash_attn-NHD", folder, UNEVEN, enable_prefix_caching=False) as llm,
        pytest.raises(AssertionError),
    ):
        check(llm, dense, prompts(200, 97), UNEVEN, greedy(10))
    monkeypatch.undo()
    with gpu_engine("flash_attn-NHD", folder, UNEVEN, enable_prefix_caching=False) as llm:
        check(llm, dense, prompts(200, 97), UNEVEN, greedy(10))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_last_chunk_of_one_token(folder: Path, dense: Any, name: str) -> None:
    """It looks like a step of decoding."""
    with gpu_engine(name, folder, SETTINGS, enable_prefix_caching=False, max_num_batched_tokens=96) as llm:
        for length in (97, 193):
            check(llm, dense, prompts(length), SETTINGS, greedy(8))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_shared_prefix(folder: Path, dense: Any, name: str) -> None:
    [text] = prompts(320)
    texts = [text[:256] + text[256 + i : 310 + i] for i in (0, 5, 9)]  # of 310 tokens
    with gpu_engine(name, folder, SETTINGS, enable_prefix_caching=True) as llm:
        cached = []
        for one in texts:
            check(llm, dense, [one], SETTINGS, greedy(12))
            cached.append(cached_tokens(llm, one, greedy(1)))
        assert set(cached) == {dropped(310, 0.5, BLOCK)}


@pytest.mark.parametrize("name", ["cpu", "flash_attn-NHD", "flashinfer-NHD"])
def test_tables_that_do_not_divide_by_heads(tmp_path: Path, name: str) -> None:
    """vLLM rounds the width of block tables up: 29 blocks of three heads take 88 entries."""
    folder = save(tmp_path / "model", hidden_size=192, num_attention_heads=6, num_key_value_heads=3)
    dense = load(folder)
    settings = {**SETTINGS, "counts": "head", "shares": [[0.5, 1.0, 1.5]] * 4}
    options: dict[str, Any] = dict(enable_prefix_caching=False, max_model_len=928)
    start = engine(folder, settings, **options) if name == "cpu" else gpu_engine(name, folder, settings, **options)
    with start as llm:
        check(llm, dense, prompts(190, 65), settings, greedy(8))


@pytest.mark.parametrize("name", BACKENDS)
def test_steps_that_are_measured_take_what_evictions_take(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's steps without metadata, by which it knows how much memory is left for the pool."""
    taken: list[Any] = []
    with gpu_engine(name, folder, SETTINGS, max_model_len=512) as llm:
        monkeypatch.setattr(gpu, "torch", SimpleNamespace(empty=lambda *shape, **_: taken.append(shape)))
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        query, key = torch.zeros(5, 8, 32), torch.zeros(5, 4, 32)
        for layer in layers.values():
            layer.impl.forward(layer, query, key, key, torch.empty(0), None, torch.empty_like(query))
        assert taken == SIZES["num_hidden_layers"] * [(2, 4, 512, 32)]


BLOCKS = {
    "flashinfer-NHD": (128, "got 128 tokens, of which it takes 64: set --block-size 64"),
    "flash_attn-NHD": (48, "expected --block-size to be a power of two, got 48"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_do_not_fit_are_refused(folder: Path, name: str) -> None:
    size, words = BLOCKS[name]
    with pytest.raises(ValueError, match=words), gpu_engine(name, folder, SETTINGS, block_size=size):
        pass


def test_a_backend_that_does_not_evict_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM chooses backends itself where none is given."""
    monkeypatch.setattr(backends, "CPU", {})
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    with engine(folder, SETTINGS) as llm, pytest.raises(RuntimeError, match="with the backend CPU_ATTN, .* got none"):
        run(llm, prompts(60), greedy(1))
