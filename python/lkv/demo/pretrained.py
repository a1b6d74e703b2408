"""A pretrained model and an essay with four facts in it: what each method answers, from how many bytes, and how fast.

The essay is read once. Every method evicts a fork of what was read, and answers every question from a fork of that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import prefill, protected, second_pass_scores
from lkv.demo.machine import describe
from lkv.evaluate.decode import answer
from lkv.evaluate.methods import FULL
from lkv.evaluate.run import found
from lkv.hf import Cache
from lkv.learn.dialogue import Exchange, exchange
from lkv.policies import Policy
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv import Learned
from lkv.policies.snapkv import SnapKV
from lkv.second_pass import in_words
from lkv.tasks.documents import Document
from lkv.tasks.facts import Fact
from lkv.tasks.passages import Passage, passage
from lkv.text import decode, pad_and_ends

ESSAY = Path(__file__).with_name("essay.txt")
FACTS = 4
LIMIT = 16  # tokens of an answer
STEPS = 12  # of decoding, whose time is taken
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What one method did.

    Attributes:
        kept: share of the rows. nbytes: of their keys and values.
        second_pass, evict, step: seconds; a step is one more token.
        right: answers that hold their value.
    """

    method: str
    kept: float
    nbytes: int
    second_pass: float
    evict: float
    step: float
    right: int


def show(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lkv: Learned | None, options: argparse.Namespace
) -> None:
    text = weave(tokenizer, options.text, options.tokens, options.seed)
    talk = exchange(tokenizer, text, 0)
    print(describe(model, options.model))
    print(
        f"{options.text.name}: {len(talk.context)} tokens with the chat template. Four sentences do not belong there:"
    )
    for fact in text.facts:
        print(f"  {fact.statement}")
    policies: dict[str, Policy | None] = {FULL: None, "lkv": lkv, "kvzip": KVzip(), "snapkv": SnapKV()}
    if lkv is None:
        del policies["lkv"]
        print(f"There is no checkpoint of LKV for {options.model} in this package; `lkv train` makes one.")
    ids = torch.tensor([talk.context], device=model.device)
    print("\nreading it once ... ", end="", flush=True)
    whole, seconds = timed(model, partial(read, model, ids, [x for x in policies.values() if x is not None]))
    print(f"{seconds:.1f} s. No method knows the questions.\n")
    subject = Subject(model, tokenizer, whole, ids, talk, text.facts)
    print(table([subject.judge(name, policy, options.retention) for name, policy in policies.items()]))


def weave(tokenizer: PreTrainedTokenizerBase, path: Path, tokens: int, seed: int) -> Passage:
    """Facts between the sentences of a text, of so many tokens together at most.

    Raises:
        ValueError: for a text that is too short.
    """
    document = Document("demo", path.name, path.read_text(encoding="utf-8"), "", "test")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return passage([document], 0, tokens, count, split="test", facts=FACTS, continuation=1, seed=seed)


def read(model: PreTrainedModel, ids: Tensor, policies: Sequence[Policy]) -> Cache:
    """All rows of a text, with what the policies need to judge them."""
    needs: frozenset[str] = frozenset().union(*(policy.needs for policy in policies))
    return prefill(model, ids, needs=needs, window=max(policy.window for policy in policies))


@dataclass(frozen=True)
class Subject:
    """A text that was read, and what it is questioned about. `whole`: the cache of all rows, for `ids` `[1, n]`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    whole: Cache
    ids: Tensor
    talk: Exchange
    facts: Sequence[Fact]

    def judge(self, name: str, policy: Policy | None, retention: float) -> Outcome:
        """Evicts a fork, answers the questions, and prints what comes out as it comes."""
        print(f"{name}: ", end="", flush=True)
        with self.whole.fork() as cache:
            second, evict = self.evict(cache, policy, retention)
            nbytes = cache.retained_bytes
            kept = nbytes / self.whole.retained_bytes
            print(f"{kept:.0%} of the rows, {nbytes / 2**20:.1f} MiB", flush=True)
            right = 0
            for question, fact in zip(self.talk.questions, self.facts, strict=True):
                text = self.reply(cache, question)
                good = found(text, [fact.value]) == 1
                right += good
                print(f"  {'right' if good else 'wrong'}  {fact.lead} ... {' '.join(text.split())}", flush=True)
            return Outcome(name, kept, nbytes, second, evict, self.step(cache), right)

    def evict(self, cache: Cache, policy: Policy | None, retention: float) -> tuple[float, float]:
        """Seconds of the second pass, and of scores and eviction."""
        scores, second = None, 0.0
        if policy is None:
            return 0.0, 0.0
        if "second_pass" in policy.needs:  # neither repeats nor evicts the chat template, as its authors have it
            begin = self.talk.protected
            policy = protected(in_words(policy, self.tokenizer), begin)
            repeat = partial(second_pass_scores, self.model, self.whole, self.ids, policy, begin=begin)
            scores, second = timed(self.model, repeat)
        return second, timed(self.model, partial(cache.evict, policy, retention=retention, scores=scores))[1]

    def reply(self, cache: Cache, question: Sequence[int]) -> str:
        """What the model writes after a question; the cache stays as it is."""
        pad, ends = pad_and_ends(self.model, self.tokenizer)
        with cache.fork() as own:
            (tokens,) = answer(self.model, own, torch.ones_like(self.ids), [question], LIMIT, pad, ends)
        return decode(self.tokenizer, tokens)

    def step(self, cache: Cache) -> float:
        """Seconds of one more token."""
        token, ends = self.talk.questions[0][-1:], ()
        with cache.fork() as own:
            seen = torch.ones_like(self.ids)
            answer(self.model, own, seen, [token], 1, 0, ends)  # packs the rows of a whole cache
            seen = torch.cat([seen, seen[:, :1]], 1)
            return timed(self.model, partial(answer, self.model, own, seen, [token], STEPS, 0, ends))[1] / STEPS


def timed(model: PreTrainedModel, work: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and its seconds."""
    begin = time.perf_counter()
    made = work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return made, time.perf_counter() - begin


def table(outcomes: Sequence[Outcome]) -> str:
    head = f"{'':8} {'kept':>6} {'K and V':>10} {'2nd pass':>9} {'eviction':>9} {'a token':>8}   right"
    lines = [
        f"{x.method:8} {x.kept:>6.0%} {x.nbytes / 2**20:>6.1f} MiB {x.second_pass:>7.1f} s {x.evict:>7.2f} s "
        f"{1e3 * x.step:>5.0f} ms   {x.right} of {FACTS}"
        for x in outcomes
    ]
    return "\n".join(["", head, *lines, ""])
