"""Answers of an engine that evicts beside those of the dense model whose evicted positions are masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dense import SIZES, generate, kept_rows
from engine import BLOCK, answers
from torch import Tensor

from lkv.vllm.settings import dropped


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Of no token twice: in the first layer its keys would have the same norm, and rounding would choose."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(SIZES["vocab_size"], generator=generator)[:n].tolist() for n in lengths]


def keep(prompt: Sequence[int], settings: dict[str, Any], retention: float | None = None) -> Any:
    """Which rows `[H, P]` of a layer stay, by the norms of their keys; as `dense.generate` takes it."""
    part = settings["retention"] if retention is None else retention
    if len(prompt) < settings["min_prompt"]:
        part = 1.0

    def rows(layer: int, keys: Tensor, values: Tensor) -> Tensor:
        shares = settings["shares"][layer] if "shares" in settings else [1.0]
        drops = [dropped(len(prompt), share * part, BLOCK) if part < 1 else 0 for share in shares]
        return kept_rows(keys, -keys.norm(dim=-1), drops, settings["sink"], settings["window"])

    return rows


def check(llm: Any, dense: Any, texts: list[list[int]], settings: dict[str, Any], params: Any, **own: Any) -> None:
    """The tokens are the same, and their logprobs within float32's rounding."""
    compare(dense, texts, settings, answers(llm, texts, params), **own)


def compare(dense: Any, texts: list[list[int]], settings: dict[str, Any], found: list[Any], **own: Any) -> None:
    for text, (tokens, logprobs) in zip(texts, found, strict=True):
        expected, theirs = generate(dense, text, len(tokens), keep(text, settings, **own))
        assert tokens == expected, f"prompt of {len(text)}"
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(theirs), atol=5e-4, rtol=0)
