"""A text is read once and evicted, and then asked as often as one likes: the one place where that is done."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import policies
from lkv.hf import Cache
from lkv.hf.settings import Settings
from lkv.hf.versions import with_cache
from lkv.passes import Context
from lkv.policies import Ahead, Policy, Protect, Scorer
from lkv.policies.streaming_llm import StreamingLLM
from lkv.second_pass import in_words, repeat_scores
from lkv.text import most_tokens


def compress(
    model: PreTrainedModel,
    ids: Tensor,
    policy: str | Policy = "snapkv",
    *,
    retention: float | None = None,
    budget: int | None = None,
    attention_mask: Tensor | None = None,
    protect: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reserve: int = 64,
) -> Cache:
    """Reads texts and keeps the rows that a policy chooses, after a second pass if the policy needs one.

        cache = lkv.compress(model, document, "kvzip", retention=0.15, tokenizer=tokenizer)
        for question in questions:
            with cache.fork() as own:
                model.generate(torch.cat([document, question], 1), past_key_values=own)

    What comes later is no prompt: neither questions nor answers are evicted.

    Args:
        ids: `[B, n]`, tokens.
        policy: a name, or a policy object. One that scores in the first pass evicts layer by layer while the model
            reads, so that one layer at a time is whole; with a second pass, or where layers compete, all of them are.
        retention: fraction of each text to keep, in (0, 1]; or budget: rows to keep; both per head, on average over a
            layer's heads, or over all of the model where layers compete.
        attention_mask: `[B, n]`, 0 for padding, which has to be in front where there is a second pass.
        protect: the first tokens of each text that all heads keep, inside the budget: a system prompt, or what a chat
            template begins with. A second pass does not repeat them.
        tokenizer: for a second pass: the words and the chat template that ask for the repetition. Without it the text
            comes again with nothing before it, which is enough for models that go on with what they have seen.
        reserve: rows of slack after the rows of every head.

    Returns:
        A cache for `generate` and for the model's own `forward`; `fork()` it for each question.

    Raises:
        ValueError, TypeError: for arguments out of range or that do not fit each other, and see `lkv.Cache`.

    Warns:
        UserWarning: for texts that are longer than what the model reads, as its config has it.
    """
    policy = policies.get(policy)
    if tokenizer is not None:
        policy = in_words(policy, tokenizer)
    policy = protected(policy, protect)
    needs, window = policy.needs - {"second_pass"}, max(policy.window, 1)
    settings = Settings(policy, retention, budget, "each", None, 1, reserve, needs, window)
    _check(model, ids, attention_mask, protect, settings)
    if "second_pass" not in policy.needs:
        cache = Cache(model, policy, retention=retention, budget=budget, reserve=reserve)
        with cache.prefill():
            _read(model, cache, ids, attention_mask)
        return cache
    cache = prefill(model, ids, attention_mask, needs, window, reserve=reserve)
    scores = second_pass_scores(model, cache, ids, policy, begin=protect)
    cache.evict(policy, retention=retention, budget=budget, scores=scores)
    return cache


def prefill(
    model: PreTrainedModel,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    needs: Iterable[str] = (),
    window: int = 1,
    *,
    reserve: int = 64,
) -> Cache:
    """A cache that has read texts `[B, n]` and keeps all of them, for `evict` with policies of these needs and window.

    Fork it for each policy. Nothing that comes later is evicted.
    """
    observe = frozenset(needs) - {"second_pass"}
    cache = Cache(
        model,
        StreamingLLM(),
        retention=1.0,
        chunks="last",
        observe=observe,
        observe_window=max(window, 1),
        reserve=reserve,
    )
    _read(model, cache, ids, attention_mask)  # whole rows are shared by forks, and packed by the next token
    return cache


@torch.no_grad()
def _read(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None) -> None:
    """One call of the decoder: nobody needs the logits of the texts."""
    decoder, places = model.get_decoder(), None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
    decoder(ids, attention_mask=mask, position_ids=places, **with_cache(decoder, cache))


def second_pass_scores(
    model: PreTrainedModel, cache: Cache, ids: Tensor, policy: Policy, *, begin: int = 0
) -> list[Tensor]:
    """Scores for `cache.evict` of a policy that needs "second_pass": float32 `[B, H, n]` per layer.

    Args:
        cache: that has read `ids` `[B, n]`, and holds all rows.
        begin: the first token of each text that is repeated.

    Raises:
        ValueError: for a cache of other texts, or that has evicted rows or had padding elsewhere than in front.
    """
    context = Context.of(cache)
    size, lengths = context.size, context.lengths
    if ids.shape != (context.batch, size):
        raise ValueError(
            f"lkv.second_pass: expected tokens of shape [B, n] = {[context.batch, size]}, got {list(ids.shape)}"
        )
    places = torch.arange(size, device=ids.device)
    in_front = size - lengths[:, None]
    tokens = ids.gather(1, (places + in_front) % size)
    scores = repeat_scores(model, context, tokens, policy, begin=begin)
    back = ((places - in_front) % size)[:, None]
    return [x.take_along_dim(back, 2) for x in scores]


def protected(policy: Policy, rows: int) -> Policy:
    """The policy, but with the first `rows` rows of every head kept whatever their scores.

    Raises:
        ValueError: for a policy without a `sink` that can be set.
    """
    if policy.sink >= rows:
        return policy
    scorer = getattr(policy, "scorer", None)
    names: list[str] = [x.name for x in fields(policy)] if is_dataclass(policy) else []
    if "sink" in names:
        return replace(policy, sink=rows)  # type: ignore[type-var]  # a dataclass
    if "scorer" in names and isinstance(scorer, Policy):
        return replace(policy, scorer=protected(scorer, rows))  # type: ignore[type-var]  # a dataclass
    if isinstance(policy, Scorer) and not isinstance(policy, Ahead):
        return Protect(policy, sink=rows)
    raise ValueError(f"lkv.compress: expected a policy with a setting `sink` where tokens are protected, got {policy}")


def _check(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, protect: int, settings: Settings) -> None:
    """
    Raises:
        ValueError: for texts, a mask and protected tokens that do not fit each other, or the budget.

    Warns:
        UserWarning: see `compress`.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"lkv.compress: expected ids of shape [B, n], whole numbers, one or more, got {got}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"lkv.compress: expected attention_mask of shape [B, n] = {list(ids.shape)}, got {list(mask.shape)}"
        )
    lengths = [ids.shape[1]] if mask is None else mask.long().sum(1).tolist()
    if min(lengths) < 1:
        raise ValueError(f"lkv.compress: expected one token or more of each text, got {lengths}")
    least = min(settings.target(n) for n in lengths)
    if not 0 <= protect <= least:
        raise ValueError(
            f"lkv.compress: expected protect in [0, {least}], as many rows as a head of the shortest text keeps on "
            f"average, got {protect}"
        )
    most = most_tokens(model)
    if most is not None and max(lengths) > most:
        warnings.warn(
            f"lkv.compress: expected texts of at most the {most} tokens that the model reads, got one of "
            f"{max(lengths)}: what it answers may be wrong",
            stacklevel=3,
        )
