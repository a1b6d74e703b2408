"""The path for GPUs, on stand-ins for the kernels: answers of the masked dense model, and the blocks of the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from compared import check, prompts  # noqa: E402
from engine import SETTINGS, free_blocks, greedy  # noqa: E402
from gpu_engine import gpu_engine  # noqa: E402
from stand_ins import CALLS  # noqa: E402

LENGTHS = (40, 64, 65, 97, 128, 200, 256)
DESIGNS: dict[str, dict[str, Any]] = {
    "equal": {},
    "layers": {"counts": "layer", "shares": [[0.5], [1.5], [1.5], [1.5]]},
    "heads": {"counts": "head", "shares": [[0.5, 1.0, 1.5, 2.0], [0.25, 0.25, 1.0, 0.5]] * 2},
}
OPTIONS: dict[str, Any] = dict(enable_prefix_caching=False, max_num_batched_tokens=160, blocks=1000)
RUN = {
    "flash_attn-NHD": {"flash_attn"},
    "flash_attn-HND": {"flash_attn"},
    "flashinfer-NHD": {"Prefill", "Decode"},
    "flashinfer-HND": {"Prefill", "Decode"},
    "xqa-NHD": {"Prefill", "xqa decode"},
    "trtllm-HND": {"trtllm context", "trtllm decode"},
}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", RUN)
def test_tokens_and_logprobs(folder: Path, dense: Any, name: str, design: str) -> None:
    settings = {**SETTINGS, **DESIGNS[design]}
    with gpu_engine(name, folder, settings, **OPTIONS) as llm:
        free = free_blocks(llm)
        check(llm, dense, prompts(*LENGTHS), settings, greedy(10))
        check(llm, dense, prompts(190), settings, greedy(6, extra_args={"lkv": {"retention": 0.3}}), retention=0.3)
        assert free_blocks(llm) == free
    assert set(CALLS) == RUN[name]
