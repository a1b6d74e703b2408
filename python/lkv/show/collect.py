"""What a page shows: which rows every head keeps of a text, what that saves, and what the model answers from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import policies as known
from lkv.compression import compress, prefill, protected
from lkv.evaluate.decode import answer
from lkv.evaluate.kept import kept_rows
from lkv.hf import Cache
from lkv.policies import Policy
from lkv.show.units import Unit, opening_units, units
from lkv.text import ask, check_known, decode, encode, most_tokens, opening, pad_and_ends


@dataclass(frozen=True)
class Method:
    """What one policy leaves of a text.

    Attributes:
        rows: positions of the rows of every layer and KV head, ascending: int64 `[kept]`.
        nbytes: of keys and values.
        answers: to the questions.
    """

    name: str
    rows: list[list[Tensor]]
    nbytes: int
    answers: list[str]

    @property
    def kept(self) -> int:
        """Rows of all heads of all layers."""
        return sum(len(head) for layer in self.rows for head in layer)


@dataclass(frozen=True)
class Shown:
    """A text and what each of several policies keeps of it.

    Attributes:
        model: its name. dtype: of keys and values.
        units: pieces of the text with the number of their tokens, those before the text included.
        opening: how many of the units come before the text: a chat template, or the beginning token.
        layers: indices of the layers that are evicted. heads: KV heads of each of them.
        nbytes: of keys and values of all rows of these layers.
        answers: from all rows.
    """

    title: str
    model: str
    dtype: str
    retention: float
    units: list[Unit]
    opening: int
    layers: list[int]
    heads: list[int]
    nbytes: int
    questions: list[str]
    answers: list[str]
    methods: list[Method]

    @property
    def tokens(self) -> int:
        """Of the text and what comes before it: rows that each head has before the eviction."""
        return sum(count for _, count in self.units)

    @property
    def rows(self) -> int:
        """Rows of all heads of these layers before the eviction."""
        return self.tokens * sum(self.heads)


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    policies: Sequence[str] | Mapping[str, str | Policy],
    *,
    retention: float = 0.15,
    questions: Sequence[str] = (),
    protect: int | None = None,
    limit: int = 64,
    title: str = "text",
    name: str | None = None,
) -> Shown:
    """Reads a text with each policy and with the full cache, and answers questions from what they leave.

    The questions are not seen by the compression. With a chat template, the text is what a user writes.

    Args:
        policies: names of `lkv.policies`, or policies by the names that they shall have.
        retention: fraction of the rows to keep, in (0, 1].
        protect: first tokens that all heads keep. Default: for a policy with a second pass all tokens before the text,
            as KVzip's authors do; for others what they protect by themselves.
        limit: most tokens of an answer.
        title, name: of the text and of the model; default: what the model's config names.

    Raises:
        ValueError: for arguments out of range, a text without tokens, that the tokenizer does not know, that is too
            long for the model or too short for what is protected; before the model runs.
    """
    chosen = choose(policies)
    check(retention, questions, limit)
    begin, tokens = opening(tokenizer), encode(tokenizer, text)
    prompts = [ask(tokenizer, question) for question in questions]
    check_text(model, tokenizer, [*begin, *tokens], len(tokens), max(map(len, prompts), default=0), limit)
    guarded = {label: guard(policy, protect, len(begin)) for label, policy in chosen.items()}
    for label, policy in chosen.items():
        check_protected(label, policy, guarded[label], retention, len(begin) + len(tokens))
    before, pieces = opening_units(tokenizer, begin), units(tokenizer, tokens, text)
    ids = torch.tensor([[*begin, *tokens]], device=model.device)

    def answers(cache: Cache) -> list[str]:
        found, (pad, ends) = [], pad_and_ends(model, tokenizer)
        for prompt in prompts:
            with cache.fork() as own:
                (row,) = answer(model, own, torch.ones_like(ids), [prompt], limit, pad, ends)
            found.append(decode(tokenizer, row).strip())
        return found

    with prefill(model, ids) as whole:
        layers, heads = [layer.index for layer in whole.ragged], [layer.heads for layer in whole.ragged]
        nbytes, full = whole.retained_bytes, answers(whole)
    methods = []
    for label, policy in chosen.items():
        with compress(model, ids, policy, retention=retention, protect=guarded[label], tokenizer=tokenizer) as cache:
            methods.append(Method(label, kept_rows(cache), cache.retained_bytes, answers(cache)))
    name = name or os.path.basename((model.config.name_or_path or "").rstrip("/")) or type(model).__name__
    dtype = str(model.dtype).removeprefix("torch.")
    return Shown(
        *(title, name, dtype, retention, [*before, *pieces], len(before), layers, heads, nbytes),
        *(list(questions), full, methods),
    )


def choose(policies: Sequence[str] | Mapping[str, str | Policy]) -> dict[str, Policy]:
    """Policies by the names that a page gives them.

    Raises:
        ValueError: for none, a name given twice or that is not known.
    """
    names = [policies] if isinstance(policies, str) else list(policies)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"lkv.show: expected one policy or more, none of them twice, got {', '.join(names) or 'none'}")
    return {name: known.get(policies[name] if isinstance(policies, Mapping) else name) for name in names}


def guard(policy: Policy, protect: int | None, before: int) -> int:
    """First tokens that all heads shall keep whatever the policy protects by itself."""
    if protect is not None:
        return protect
    return before if "second_pass" in policy.needs else 0


def check(retention: float, questions: Sequence[str], limit: int) -> None:
    """
    Raises:
        ValueError: for an argument out of range.
    """
    if not 0 < retention <= 1:
        raise ValueError(f"lkv.show: expected a retention in (0, 1], got {retention}")
    if isinstance(questions, str) or not all(question.strip() for question in questions):
        raise ValueError(f"lkv.show: expected questions that are not empty, got {questions!r}")
    if limit < 1:
        raise ValueError(f"lkv.show: expected answers of at least one token, got {limit}")


def check_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    own: int,
    question: int,
    limit: int,
) -> None:
    """
    Args:
        own: how many of the tokens are the text's. question: tokens of the longest one.

    Raises:
        ValueError: for a text that is empty, unknown or too long.
    """
    if own < 1:
        raise ValueError("lkv.show: expected a text of one or more tokens, got none")
    check_known(tokenizer, tokens, "one", "lkv.show")
    most = most_tokens(model)
    behind = question + limit if question else 0
    if most is not None and len(tokens) + behind > most:
        beside = len(tokens) - own + behind
        raise ValueError(
            f"lkv.show: expected a text of at most {most - beside} tokens, as the model reads {most}, of which the "
            f"chat template, a question and its answer may take {beside}, got {own}"
        )


def check_protected(name: str, policy: Policy, protect: int, retention: float, tokens: int) -> None:
    """
    Raises:
        ValueError: for a text of which no rows would be left to choose, and a policy that cannot protect.
    """
    if protect < 0:
        raise ValueError(f"lkv.show: expected protect >= 0, got {protect}")
    rows, sink = max(1, round(retention * tokens)), protected(policy, protect).sink
    if retention < 1 and rows <= sink + policy.window:
        raise ValueError(
            f"lkv.show: expected a text of which a head keeps more than the first {sink} and the last {policy.window} "
            f"rows, which {name} protects, got {tokens} tokens, of which {retention:.1%} are {rows}: take a longer "
            "text or a larger retention"
        )
