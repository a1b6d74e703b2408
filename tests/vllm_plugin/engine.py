"""Small engines of vLLM, in this process, and what is in their pools."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

import lkv.vllm

BLOCK = 32
SETTINGS = {"policy": "knorm", "retention": 0.5, "min_prompt": 48, "sink": 2, "window": 3}


@contextlib.contextmanager
def engine(folder: Path, settings: dict[str, Any] | None, *, blocks: int = 256, **options: Any) -> Iterator[LLM]:
    """An engine with `blocks` blocks, one of them the null block."""
    lkv.vllm.register()
    options = {"max_model_len": 1024, "max_num_batched_tokens": 4096, "max_num_seqs": 64, **options}
    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype=options.pop("dtype", "float32"), enforce_eager=True,
        block_size=options.pop("block_size", BLOCK),
        num_gpu_blocks_override=blocks, disable_log_stats=True, seed=0,
        additional_config={} if settings is None else {"lkv": settings}, **options,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: LLM) -> int:
    return int(scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks())


def greedy(tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False, **options)


def run(llm: LLM, prompts: list[list[int]], params: Any) -> list[Any]:
    return list(llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False))


def answers(llm: LLM, prompts: list[list[int]], params: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens and their logprobs."""
    found = []
    for output in run(llm, prompts, params):
        tokens = list(output.outputs[0].token_ids)
        found.append((tokens, [step[t].logprob for step, t in zip(output.outputs[0].logprobs, tokens, strict=True)]))
    return found
