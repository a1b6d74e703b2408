"""What comes into a layer, from the model and from the policy, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lkv.policies import Observation, Policy

if TYPE_CHECKING:
    from lkv.hf.layer import RaggedLayer


def check_tokens(layer: RaggedLayer, keys: Tensor, values: Tensor) -> None:
    """Refuses new keys and values `[B, H, n, D]` that do not fit the rows that are there.

    Raises:
        ValueError: for another shape, dtype or device, and where a gradient is required.
    """
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise ValueError("lkv.Cache: expected a model run under torch.no_grad, got keys that require a gradient")
    if layer.rows is None and layer.keys is None:
        return
    for name, new in (("keys", keys), ("values", values)):
        if layer.rows is None:
            old = getattr(layer, name)
            expected = (old.shape[0], old.shape[1], old.shape[3])
        else:
            old = layer.rows.k if name == "keys" else layer.rows.v
            expected = (*layer.rows.lengths.shape, old.shape[1])
        if (new.shape[0], new.shape[1], new.shape[3]) != expected:
            form = f"[{expected[0]}, {expected[1]}, n, {expected[2]}]"
            raise ValueError(f"lkv.Cache: expected {name} of shape [B, H, n, D] = {form}, got {list(new.shape)}")
        if new.device != old.device or new.dtype != old.dtype:
            raise ValueError(
                f"lkv.Cache: expected {name} of {old.dtype} on {old.device}, got {new.dtype} on {new.device}"
            )


def check_scores(policy: Policy, scores: Tensor, observed: Observation) -> None:
    """Raises ValueError for scores that are not one for every row that was observed."""
    expected = observed.keys.shape[:3]
    if not isinstance(scores, Tensor) or scores.shape != expected:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"lkv.Cache: expected scores of {policy} of shape [B, H, L] = {list(expected)}, got {got}")


def check_budgets(policy: Policy, budgets: Tensor, expected: Sequence[int]) -> None:
    """Raises ValueError for budgets of another shape than `[B, H]` (`[N, B, H]`), and for such as are not whole."""
    if not isinstance(budgets, Tensor) or budgets.shape != expected or budgets.is_floating_point():
        got = f"{budgets.dtype} {list(budgets.shape)}" if isinstance(budgets, Tensor) else type(budgets).__name__
        form = "[B, H]" if len(expected) == 2 else "[N, B, H]"
        raise ValueError(f"lkv.Cache: expected whole budgets of {policy} of shape {form} = {list(expected)}, got {got}")
