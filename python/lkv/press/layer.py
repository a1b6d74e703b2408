"""A layer as a press sees it, observed for a policy: what its attention was called with, and whole rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress.utils import compute_n_kept, get_prerope_query_states
from torch import Tensor

from lkv.hf.capture import ROTATED, Captured
from lkv.hf.masks import PaddingInfo
from lkv.hf.observation import ObservationBuffer
from lkv.hf.settings import Settings
from lkv.hf.token_log import Rotations
from lkv.policies import Carried, Policy
from lkv.policies.expected_attention import turned
from lkv_ext import RaggedCache


class PressSettings(Settings):
    """Rows as kvpress counts them: `int(length * (1 - compression_ratio))`, at least 1."""

    def target(self, length: int) -> int:
        return compute_n_kept(length, 1 - (self.retention or 0))

    @classmethod
    def of(cls, policy: Policy, ratio: float) -> PressSettings:
        return cls(policy, 1 - ratio, None, "each", None, 1, 1, policy.needs, max(policy.window, 1))


@dataclass
class PressedLayer:
    """What `lkv.hf.planning` plans for: see `ObservedLayer`. `module`: its attention; `padded`: some rows are none."""

    module: Any
    index: int
    rank: tuple[int, int]
    keys: Tensor
    values: Tensor
    observations: ObservationBuffer
    token_counts: list[int]
    settings: Settings
    rows: RaggedCache | None = None
    evicted: int = 0
    scaling: float = field(init=False)
    softcap: float | None = field(init=False)
    sinks: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        module: Any = self.module
        self.scaling = module.scaling
        self.softcap = getattr(module, "attn_logit_softcapping", None)
        self.sinks = getattr(module, "sinks", None)

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def row_counts(self) -> list[int]:
        """Rows of all heads together, per sequence."""
        return [n * self.heads for n in self.token_counts]

    @property
    def padded(self) -> bool:
        return min(self.token_counts) < self.keys.shape[2]

    def whole(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def carried(self) -> Carried | None:
        """Nothing: there has been no eviction."""
        return None


def observed_layer(
    module: Any,
    rank: tuple[int, int],
    settings: Settings,
    hidden_states: Tensor,
    keys: Tensor,
    values: Tensor,
    kwargs: dict[str, Any],
    cosines: Tensor | None = None,
) -> PressedLayer:
    """The layer with what the policy needs.

    Args:
        hidden_states: `[B, n, hidden]`, what its attention was called with. keys, values: `[B, H, n, D]`.
        kwargs: of the call.
        cosines: `[B, n, 1]`, what attention did to each token, where it is measured.

    Raises:
        ValueError: where rows have left before, for padding not in front, and a model whose queries are unknown.
    """
    batch, count = hidden_states.shape[:2]
    if keys.shape[2] != count:
        raise ValueError(
            f"lkv.LKVPress: expected keys of all {count} tokens, got {keys.shape[2]}: compose it before presses that "
            "prune, not after them"
        )
    padding = padding_of(kwargs.get("attention_mask"), batch, count)
    if padding is not None and padding.order is not None:
        raise ValueError("lkv.LKVPress: expected padding in front of the tokens, got some between or behind them")
    needs, kind = settings.observe, module.config.get_text_config().model_type
    queries = hidden_states.new_empty(batch, 0, count, 0)
    if needs & {"queries", "all_queries"}:
        if kind not in ROTATED:
            raise ValueError(
                f"lkv.LKVPress: expected one of {', '.join(sorted(ROTATED))} where queries are needed, got {kind}"
            )
        cos, sin = (x[:, None] for x in kwargs["position_embeddings"])
        queries = turned(get_prerope_query_states(module, hidden_states), cos, sin)
    buffer = ObservationBuffer(settings, Rotations())
    buffer.captured = Captured(module, hidden_states, kwargs["position_embeddings"])
    buffer.push(module, 0, queries, padding, lasting=True)
    if cosines is not None and buffer.cosines is not None:
        buffer.cosines.push(cosines)
    counts = [count] * batch if padding is None else padding.counts
    return PressedLayer(module, module.layer_idx, rank, keys, values, buffer, counts, settings)


def padding_of(mask: Tensor | None, batch: int, count: int) -> PaddingInfo | None:
    """What the last query does not see, by the mask of an attention function.

    Raises:
        TypeError: for a mask of another kind.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise TypeError(f"lkv.LKVPress: expected attention_mask [B, n] or [B, 1, n, n], got {type(mask).__name__}")
    last = mask if mask.dim() == 2 else mask[:, 0, -1]
    seen = last.bool() if mask.dim() == 2 or mask.dtype == torch.bool else last == 0
    return PaddingInfo.of(~seen[:, :count].expand(batch, count))
