"""What a vLLM engine evicts: the settings of the server and of a request, checked, and the rows that follow from both.

Scheduler and workers compute the same numbers from these alone: nothing is sent between them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY = "lkv"
VARIABLE = "LKV_VLLM"
COUNTS = ("equal", "layer", "head")
OFF = 1.0  # the retention of a request whose rows all stay


@dataclass(frozen=True)
class Settings:
    """The object under "lkv" in vLLM's `additional_config`, or in the environment variable LKV_VLLM.

    Attributes:
        policy: name of a policy, or the folder of an LKV checkpoint.
        retention: part of a prompt's rows that stay, on average over layers and heads, in (0, 1].
        counts: "equal": as many rows in every head; "layer": a number for each layer; "head": for each layer and head.
        min_prompt: prompts of fewer tokens are not evicted.
        sink, window: first and last tokens of a prompt that stay in every head, within what it keeps. Default: the
            policy's own.
        shares: for counts "layer" and "head", what is kept as multiples of the retention: for every layer a list of one
            number, or of one per KV head. Layers of the same list share blocks: use few different ones. Default: those
            of the LKV checkpoint.
    """

    policy: str
    retention: float
    counts: str = "equal"
    min_prompt: int = 512
    sink: int | None = None
    window: int | None = None
    shares: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        def expect(condition: bool, expected: str, name: str) -> None:
            if not condition:
                raise ValueError(f"lkv.vllm: expected {expected}, got {getattr(self, name)!r}")

        expect(isinstance(self.policy, str) and self.policy != "", "policy to be a name or a folder", "policy")
        expect(_number(self.retention) and 0 < self.retention <= 1, "retention in (0, 1]", "retention")
        expect(self.counts in COUNTS, f"counts of {', '.join(COUNTS)}", "counts")
        for name in ("min_prompt", "sink", "window"):
            value = getattr(self, name)
            counts = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            expect(counts or (value is None and name != "min_prompt"), f"{name} >= 0", name)
        if self.shares is not None:
            expect(self.counts != "equal", "counts 'layer' or 'head' with shares", "counts")
            positive = isinstance(self.shares, (list, tuple)) and all(
                isinstance(row, (list, tuple)) and row and all(_number(x) and x > 0 for x in row) for row in self.shares
            )
            expect(positive, "shares to be a list of positive numbers for every layer", "shares")
            object.__setattr__(self, "shares", tuple(tuple(map(float, row)) for row in self.shares))

    @classmethod
    def of(cls, additional_config: Any) -> Settings | None:
        """The settings in vLLM's `additional_config`; None where there are none, which is a vLLM without eviction.

        Raises:
            ValueError: for names that there are not, and for values out of range.
        """
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise ValueError(f"lkv.vllm: expected additional_config['{KEY}'] to be an object, got {given!r}")
        names = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"lkv.vllm: expected settings of {', '.join(names)}, got {', '.join(map(repr, unknown))}")
        missing = [name for name in ("policy", "retention") if name not in given]
        if missing:
            raise ValueError(f"lkv.vllm: expected {' and '.join(missing)} among the settings, got {dict(given)}")
        return cls(**given)

    def effective(self, prompt: int, extra_args: Mapping[str, Any] | None) -> float:
        """The retention of a request, from its prompt's length in tokens and its `extra_args`; 1 is no eviction."""
        if prompt < self.min_prompt:
            return OFF
        own = request_retention(extra_args)
        return self.retention if own is None else own


def from_environment() -> dict[str, Any] | None:
    """The object in LKV_VLLM, for an `additional_config`; None where it is not set."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"lkv.vllm: expected an object in JSON in {VARIABLE}, got {text!r}: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"lkv.vllm: expected an object in JSON in {VARIABLE}, got {text!r}")
    return given


def request_retention(extra_args: Mapping[str, Any] | None) -> float | None:
    """What `SamplingParams(extra_args={"lkv": ...})` says: `{"retention": 0.3}`, or False for no eviction.

    Raises:
        ValueError: for anything else.
    """
    own = (extra_args or {}).get(KEY)
    if own is None:
        return None
    if own is False:
        return OFF
    if isinstance(own, Mapping) and set(own) == {"retention"}:
        retention = own["retention"]
        if _number(retention) and 0 < retention <= 1:
            return float(retention)
    raise ValueError(
        f"lkv.vllm: expected extra_args['{KEY}'] to be false or an object of one retention in (0, 1], got {own!r}"
    )


def dropped(prompt: int, fraction: float, block: int) -> int:
    """Rows of a head that are dropped when its prompt ends: whole blocks, so that at most a block more stays.

    Args:
        prompt: tokens of the prompt.
        fraction: part of them that the head keeps; more than 1 counts as 1.
        block: tokens of a block.
    """
    kept = max(1, math.ceil(min(1.0, fraction) * prompt))
    return (prompt - kept) // block * block


def dropped_rows(prompts: NDArray[np.int64], fractions: NDArray[np.float64], block: int) -> NDArray[np.int64]:
    """`dropped` of many heads at once, to the bit; the arrays are broadcast."""
    kept = np.maximum(1, np.ceil(np.minimum(1.0, fractions) * prompts)).astype(np.int64)
    return (prompts - kept) // block * block


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
