"""What some methods have to know of a model before they see a text: statistics of queries, curves of budgets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lkv import policies
from lkv.compression import prefill
from lkv.hf.observation import observe
from lkv.hf.planning import score
from lkv.hf.versions import with_cache
from lkv.policies import Observation, Policy, QueryStatistics
from lkv.policies.attention import attention_weights, blocks, grouped
from lkv.policies.base import scores_once
from lkv.policies.lukv import Curves

QUERIES = frozenset({"all_queries", "rotary"})


def query_statistics(model: PreTrainedModel, texts: Iterable[Tensor], *, sink: int = 4) -> QueryStatistics:
    """Mean and covariance of the queries before RoPE of some texts, for `ExpectedAttention(statistics=...)`.

    Args:
        texts: ids `[B, n]` each, without padding.
        sink: first tokens of a text that do not count, as in kvpress.

    Raises:
        ValueError: for no text of more than `sink` tokens.
    """
    count = 0
    sums: list[Tensor] = []
    products: list[Tensor] = []
    for ids in texts:
        if ids.shape[1] <= sink:
            continue
        cache = prefill(model, ids, needs=QUERIES)
        count += ids.shape[0] * (ids.shape[1] - sink)
        for n, layer in enumerate(cache.ragged):
            seen = observe(layer, QUERIES, 1)
            assert seen.rotary is not None
            rows = seen.rotary.undo(seen.part("queries"), seen.part("query_positions"))[:, :, sink:].double()
            rows = rows.transpose(0, 1).flatten(1, 2)  # [Hq, B * n, D]
            if n == len(sums):
                sums.append(torch.zeros_like(rows[:, 0]))
                products.append(rows.new_zeros(len(rows), rows.shape[2], rows.shape[2]))
            sums[n] += rows.sum(1)
            products[n] += rows.transpose(1, 2) @ rows
    if not count:
        raise ValueError(f"lkv.offline.query_statistics: expected a text of more than {sink} tokens, got none")
    mean = torch.stack(sums) / count
    covariance = torch.stack(products) / count - mean[..., :, None] * mean[..., None, :]
    return QueryStatistics(mean.float().cpu(), covariance.float().cpu())


def budget_curves(model: PreTrainedModel, texts: Iterable[Tensor], scorer: str | Policy) -> Curves:
    """Curves for `LUKV(scorer, curves)`, from texts of which the second half tells of what use the first one is.

    The use of a row is the attention that it receives from all tokens of the second half, averaged over the query heads
    of its group. See `Curves.fit` for what is made of it.

    Args:
        texts: ids `[1, n]` each, of one length or several.
        scorer: the policy whose scores decide which rows go; with its sink and window.

    Raises:
        ValueError: for a scorer whose scores depend on a budget or need a second pass, and a text that is too short.
    """
    policy = policies.get(scorer)
    if not scores_once(policy) or "second_pass" in policy.needs or policy.scope != "layer":
        raise ValueError(
            "lkv.offline.budget_curves: expected a policy whose scores are made once, while a text is read, got "
            f"{policy}"
        )
    return Curves.fit(_scores_and_use(model, texts, policy), policy.sink, policy.window)


@torch.no_grad()
def _scores_and_use(model: PreTrainedModel, texts: Iterable[Tensor], policy: Policy) -> Iterator[tuple[Tensor, Tensor]]:
    decoder = model.get_decoder()
    for ids in texts:
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
            raise ValueError(
                f"lkv.offline.budget_curves: expected ids of shape [1, n] with n > 1, got {list(ids.shape)}"
            )
        half = ids.shape[1] // 2
        cache = prefill(model, ids[:, :half], needs=policy.needs | {"all_queries"}, window=policy.window)
        scores = torch.stack([score(layer, policy, None, [half])[0][0] for layer in cache.ragged])
        decoder(ids[:, half:], **with_cache(decoder, cache))
        use = torch.stack([_received(observe(layer, frozenset({"all_queries"}), 1), half) for layer in cache.ragged])
        yield scores.cpu(), use.cpu()


def _received(seen: Observation, half: int) -> Tensor:
    """float32 `[H, half]`: what the rows of the first half receive from the tokens of the second."""
    received = torch.zeros(seen.keys.shape[1], half, device=seen.keys.device)
    for some in blocks(seen):
        later = some.part("query_positions")[0] >= half
        for head in range(len(received)):
            weights = attention_weights(some, head)[:, :, later]
            received[head] += grouped(weights.sum(2), "mean")[0, :half]
    return received
