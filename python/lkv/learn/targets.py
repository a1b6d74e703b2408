"""What LKV-T is regressed on: how much attention the frozen model itself pays to every row.

Measured on SmolLM2-135M-Instruct: at 15 % of the rows the attention from questions and answers is a better target than
that from a repetition of the text (KVzip), and its logarithm is better kept as it is than standardised for every head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

import lkv_ext
from lkv.learn.distill import pad_right
from lkv.passes import Context, follow
from lkv.second_pass import Received

# Less attention counts as this much. Of an essay of 900 tokens that SmolLM2 reads, a row needs 2e-3 to be among the
# better half of all heads and 2.4e-4 to be among the best 90 %; 4 % of the rows are below 1e-4. No retention tells
# these apart, and a regression on logarithms would spend itself on them.
LEAST = 1e-4


@torch.no_grad()
def attention(
    model: PreTrainedModel, context: Context, questions: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The most attention that a token of a question or its answer pays to a row, over the query heads of its group.

    The last token of an answer asks for nothing that is still written, and is left out.

    Args:
        context: of B texts.
        questions, replies: a number of them for each text, those of one text in a row.

    Returns:
        per layer float32 `[B, H, n]`, in [0, 1]; 0 in padding.
    """
    each = len(questions) // context.batch
    rows = [[*q, *a][:-1] for q, a in zip(questions, replies, strict=True)]
    tokens, counts = pad_right(rows, context.lengths.device)
    repeated = context.repeat(each)
    most = [k.new_zeros(k.shape[:3], dtype=torch.float32) for k in repeated.keys]
    follow(model, repeated, tokens, attend=Received(repeated, counts, None, most))
    return [x.unflatten(0, (context.batch, each)).amax(1) for x in most]


def larger(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Per layer, the larger one of two targets."""
    return [torch.maximum(a, b) for a, b in zip(first, second, strict=True)]


def logarithm(paid: Tensor) -> Tensor:
    """Of attention, at least that of `LEAST`."""
    return paid.clamp(min=LEAST).log()


def joint_shares(lengths: Tensor, target: Sequence[Tensor], retention: float, sink: int, window: int) -> Tensor:
    """Shares `[B, N, H]` that heads win when all rows of all heads compete by the target, of the rows that compete.

    Args:
        lengths: int64 `[B]`.
        target: per layer `[B, H, n]`, on one scale for all heads.
        retention: of each text, protected rows counted in.
    """
    layers, heads = len(target), target[0].shape[1]
    lengths = lengths.cpu()
    total = (lengths * retention).round().long() * layers * heads
    scores = [x.cpu() for x in target]
    budgets = lkv_ext.budgets_from_scores(scores, total, across="layers", lengths=lengths, sink=sink, window=window)
    sure = lengths.clamp(max=sink + window)
    competing = (lengths - sure).clamp(min=1)
    return ((budgets - sure[:, None]).clamp(min=0) / competing[:, None]).transpose(0, 1)
