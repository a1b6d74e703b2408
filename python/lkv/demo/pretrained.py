"""A pretrained model and an essay with four facts in it: what each method answers, from how many bytes, and how fast.

The essay is read once. Every method evicts a fork of what was read, and answers every question from a fork of that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import prefill
from lkv.demo.machine import describe
from lkv.evaluate.decode import answer
from lkv.evaluate.forks import Forks, needs_of
from lkv.evaluate.kept import kept_rows
from lkv.evaluate.methods import FULL, Method
from lkv.evaluate.run import found
from lkv.hf import Cache
from lkv.learn.dialogue import Exchange, exchange
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv import Learned
from lkv.policies.snapkv import SnapKV
from lkv.show import Method as Shows
from lkv.show import Shown, write
from lkv.show.units import opening_units, units
from lkv.tasks.documents import Document
from lkv.tasks.facts import Fact
from lkv.tasks.passages import Passage, passage
from lkv.text import decode, pad_and_ends

ESSAY = Path(__file__).with_name("essay.txt")
FACTS = 4
LIMIT = 16  # tokens of an answer
STEPS = 12  # of decoding, whose time is taken


@dataclass(frozen=True)
class Outcome:
    """What one method did.

    Attributes:
        kept: share of the rows. nbytes: of their keys and values.
        second_pass, evict, step: seconds; a step is one more token.
        answers: with their leads. right: how many of them hold their value.
        rows: positions of what is left, of every layer and KV head.
    """

    method: str
    kept: float
    nbytes: int
    second_pass: float
    evict: float
    step: float
    answers: list[str]
    right: int
    rows: list[list[Tensor]]


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
    methods = [Method(FULL, None), Method("lkv", lkv), Method("kvzip", KVzip()), Method("snapkv", SnapKV())]
    if lkv is None:
        del methods[1]
        print(f"There is no checkpoint of LKV for {options.model} in this package; `lkv train` makes one.")
    print("\nreading it once ... ", end="", flush=True)
    begin = clock()
    ids = torch.tensor([talk.context], device=model.device)
    window = max(method.policy.window for method in methods if method.policy is not None)
    whole = prefill(model, ids, needs=needs_of(methods), window=window)
    print(f"{clock() - begin:.1f} s. No method knows the questions.\n")
    asker = Asker(Forks(model, tokenizer, whole, ids, clock=clock, begin=talk.protected), talk, text.facts)
    outcomes = [asker.judge(method, options.retention) for method in methods]
    print(table(outcomes))
    page = write(asker.shown(options.text.stem, text.text, outcomes, options.retention), options.out / "page.html")
    print(f"{page}: what {outcomes[1].method} and {outcomes[2].method} keep of the text, token by token")


def weave(tokenizer: PreTrainedTokenizerBase, path: Path, tokens: int, seed: int) -> Passage:
    """Facts between the sentences of a text, of so many tokens together at most.

    Raises:
        ValueError: for a text that is too short.
    """
    document = Document("demo", path.name, path.read_text(encoding="utf-8"), "", "test")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return passage([document], 0, tokens, count, split="test", facts=FACTS, continuation=1, seed=seed)


@dataclass(frozen=True)
class Asker:
    """A text that was read once, and the questions about it."""

    forks: Forks
    talk: Exchange
    facts: Sequence[Fact]

    def judge(self, method: Method, retention: float) -> Outcome:
        """Evicts a fork, answers the questions, and prints what comes out as it comes."""
        print(f"{method.name}: ", end="", flush=True)
        scores, second = self.forks.second_pass(method)
        cache, evict = self.forks.evicted(method, retention, scores)
        with cache:
            nbytes = cache.retained_bytes
            kept = nbytes / self.forks.whole.retained_bytes
            print(f"{kept:.0%} of the rows, {nbytes / 2**20:.1f} MiB", flush=True)
            answers, right = [], 0
            for question, fact in zip(self.talk.questions, self.facts, strict=True):
                text = self.reply(cache, question)
                good = found(text, [fact.value]) == 1
                right += good
                answers.append(f"{fact.lead} {' '.join(text.split())}")
                print(f"  {'right' if good else 'wrong'}  {answers[-1]}", flush=True)
            step, rows = self.step(cache), kept_rows(cache)
        return Outcome(method.name, kept, nbytes, second, evict, step, answers, right, rows)

    def reply(self, cache: Cache, question: Sequence[int]) -> str:
        """What the model writes after a question; the cache stays as it is."""
        model, tokenizer, seen = self.forks.model, self.forks.tokenizer, torch.ones_like(self.forks.tokens)
        with cache.fork() as own:
            (tokens,) = answer(model, own, seen, [question], LIMIT, *pad_and_ends(model, tokenizer))
        return decode(tokenizer, tokens)

    def step(self, cache: Cache) -> float:
        """Seconds of one more token."""
        model, token, seen = self.forks.model, self.talk.questions[0][-1:], torch.ones_like(self.forks.tokens)
        with cache.fork() as own:
            answer(model, own, seen, [token], 1, 0, ())  # packs the rows of a whole cache
            begin = clock()
            answer(model, own, torch.cat([seen, seen[:, :1]], 1), [token], STEPS, 0, ())
            return (clock() - begin) / STEPS

    def shown(self, title: str, text: str, outcomes: Sequence[Outcome], retention: float) -> Shown:
        """All of it for a page: the first two methods beside the full cache."""
        model, tokenizer, whole = self.forks.model, self.forks.tokenizer, self.forks.whole
        before, after = self.talk.context[: self.talk.protected], self.talk.context[self.talk.protected :]
        opening = opening_units(tokenizer, before)
        full, *others = outcomes
        return Shown(
            title=title,
            model=Path(model.config.name_or_path or type(model).__name__).name,
            dtype=str(model.dtype).removeprefix("torch."),
            retention=retention,
            units=[*opening, *units(tokenizer, after, text)],
            opening=len(opening),
            layers=[layer.index for layer in whole.ragged],
            heads=[layer.heads for layer in whole.ragged],
            nbytes=full.nbytes,
            questions=[fact.question for fact in self.facts],
            answers=full.answers,
            methods=[Shows(x.method, x.rows, x.nbytes, x.answers) for x in others[:2]],
        )


def clock() -> float:
    """Seconds, when all is done that was begun."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def table(outcomes: Sequence[Outcome]) -> str:
    head = f"{'':8} {'kept':>6} {'K and V':>10} {'2nd pass':>9} {'eviction':>9} {'a token':>8}   right"
    lines = [
        f"{x.method:8} {x.kept:>6.0%} {x.nbytes / 2**20:>6.1f} MiB {x.second_pass:>7.1f} s {x.evict:>7.2f} s "
        f"{1e3 * x.step:>5.0f} ms   {x.right} of {FACTS}"
        for x in outcomes
    ]
    return "\n".join(["", head, *lines, ""])
