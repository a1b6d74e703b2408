"""Methods on passages of text files, by physical eviction: what is lost of the answers to facts and of what follows.

A passage is read once. Every method evicts a fork of it, and one forward goes over all questions with their right
answers, another one over the continuation. Nothing is masked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import prefill
from lkv.evaluate.decode import answer
from lkv.evaluate.forced import Fidelity, fidelity, foretold
from lkv.evaluate.forks import Forks, needs_of, rows_of_heads
from lkv.evaluate.methods import FULL, Method
from lkv.evaluate.oracle import Oracle
from lkv.evaluate.results import Cell
from lkv.evaluate.run import found
from lkv.hf import Cache
from lkv.hf.versions import with_cache
from lkv.learn import targets
from lkv.learn.dialogue import Exchange
from lkv.passes import Context
from lkv.tasks.passages import Passage
from lkv.text import decode, pad_and_ends

Todo = Sequence[tuple[Method, float]]


@dataclass(frozen=True)
class Ask:
    """What comes after a text: questions with their right answers, and the continuation, if there is one.

    The first token of the continuation asks for the others.
    """

    questions: list[list[int]]
    answers: list[list[int]]
    continuation: list[int]

    @property
    def all(self) -> tuple[list[list[int]], list[list[int]]]:
        if len(self.continuation) < 2:
            return self.questions, self.answers
        return [*self.questions, self.continuation[:1]], [*self.answers, self.continuation[1:]]


class Judge:
    """Judges methods on passages.

    Args:
        methods: all that come; their caches observe what any of them needs.
        see_question: the question is read before the eviction. Then each one has an eviction of its own, and there is
            no continuation.
        greedy: also answer freely. limit: tokens of such an answer, at most; default: two more than the longest right
            answer about the passage has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        methods: Sequence[Method],
        *,
        see_question: bool = False,
        greedy: bool = False,
        limit: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.see_question, self.greedy, self.limit = see_question, greedy, limit
        self.needs = needs_of(methods)
        self.window = max((m.policy.window for m in methods if m.policy is not None), default=1)

    def cells(self, index: int, passage: Passage, talk: Exchange, todo: Todo) -> Iterator[Cell]:
        """The results of methods and retentions on one passage, as they come."""
        kinds, texts = [fact.kind for fact in passage.facts], self._texts(passage, talk)
        for method, retention in todo:
            judged = [text.judge(method, retention) for text in texts]
            answers = [x for each in judged for x in each.facts]
            facts = [{"kind": kind, **x} for kind, x in zip(kinds, answers, strict=True)]
            rows = torch.tensor([each.rows for each in judged], device="cpu").sum(0).tolist()
            cost = {name: sum(each.seconds[name] for each in judged) for name in judged[0].seconds}
            read_tokens = sum(text.length for text in texts)
            yield Cell(
                *(index, passage.domain, passage.document, method.name, retention, read_tokens, rows, facts),
                *(judged[0].continuation, cost),
            )

    def _texts(self, passage: Passage, talk: Exchange) -> list[_Text]:
        """What is evicted: the passage, or the passage with each question but for its last token."""
        tokens = torch.tensor([talk.context], device=self.model.device)
        clock = time.process_time()
        whole = prefill(self.model, tokens, needs=self.needs, window=self.window)
        seconds = time.process_time() - clock
        values = [fact.value for fact in passage.facts]
        if not self.see_question:
            ask = Ask(talk.questions, talk.answers, talk.continuation)
            return [_Text(self, whole, tokens, talk.protected, ask, values, seconds)]
        texts = []
        for question, reply, value in zip(talk.questions, talk.answers, values, strict=True):
            both, clock = torch.cat([tokens, tokens.new_tensor([question[:-1]])], 1), time.process_time()
            read = self._read(whole, tokens.shape[1], question[:-1])
            spent, ask = seconds + time.process_time() - clock, Ask([question[-1:]], [reply], [])
            texts.append(_Text(self, read, both, talk.protected, ask, [value], spent))
        return texts

    @torch.no_grad()
    def _read(self, whole: Cache, length: int, question: Sequence[int]) -> Cache:
        """The cache of a text with a question behind it, none of it evicted."""
        cache, decoder = whole.fork(), self.model.get_decoder()
        tokens = torch.tensor([list(question)], device=self.model.device)
        places = torch.arange(length, length + tokens.shape[1], device=self.model.device)[None]
        decoder(tokens, position_ids=places, **with_cache(decoder, cache))
        return cache


@dataclass(frozen=True)
class _Judged:
    rows: list[list[int]]
    facts: list[dict[str, object]]
    continuation: dict[str, object] | None
    seconds: dict[str, float]


class _Text:
    """A text that was read, what comes after it, and what the full cache foretells of that."""

    def __init__(
        self,
        judge: Judge,
        whole: Cache,
        tokens: Tensor,
        begin: int,
        ask: Ask,
        values: Sequence[str],
        seconds: float,
    ) -> None:
        self.by, self.ask, self.values, self.seconds = judge, ask, values, seconds
        self.length = tokens.shape[1]
        self.forks = Forks(judge.model, judge.tokenizer, whole, tokens, begin=begin, clock=time.process_time)
        self.full = self._foretold(whole)
        self._scores: dict[str, tuple[list[Tensor] | None, float, float]] = {}  # by the names of methods

    def judge(self, method: Method, retention: float) -> _Judged:
        scores, repeating, scoring = self._scored(method)
        cache, evicting = self.forks.evicted(method, retention, scores)
        with cache:
            rows = rows_of_heads(cache)
            facts, continuation = self._fidelity(self.full if method.name == FULL else self._foretold(cache))
            judged = [{**asdict(x), "exact": x.exact} for x in facts]
            for entry, right in zip(judged, self._greedy(cache), strict=False):
                entry["greedy"] = right
        spent = {"prefill": self.seconds, "second_pass": repeating, "scores": scoring, "eviction": evicting}
        return _Judged(rows, judged, None if continuation is None else asdict(continuation), spent)

    def _foretold(self, cache: Cache) -> tuple[list[Tensor], list[Tensor]]:
        model, ask = self.by.model, self.ask
        facts = foretold(model, cache, self.length, ask.questions, ask.answers)
        if len(ask.continuation) < 2:
            return facts, []
        return facts, foretold(model, cache, self.length, [ask.continuation[:1]], [ask.continuation[1:]])

    def _fidelity(self, evicted: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Fidelity], Fidelity | None]:
        facts = fidelity(self.full[0], evicted[0], self.ask.answers)
        if not evicted[1]:
            return facts, None
        return facts, fidelity(self.full[1], evicted[1], [self.ask.continuation[1:]])[0]

    def _scored(self, method: Method) -> tuple[list[Tensor] | None, float, float]:
        """Scores of a method, the seconds of its second pass, and those of scoring; they serve all retentions."""
        if method.name not in self._scores:
            scores, repeating = self.forks.second_pass(method)
            scoring = 0.0
            if isinstance(method.policy, Oracle):
                scores, scoring = self._attention
            elif scores is None:
                scores, scoring = self.forks.scores(method)
            self._scores[method.name] = scores, repeating, scoring
        return self._scores[method.name]

    @cached_property
    def _attention(self) -> tuple[list[Tensor], float]:
        """What the full cache is looked at by all that comes after the text, and the seconds of that."""
        clock = time.process_time()
        paid = targets.attention(self.by.model, Context.of(self.forks.whole), *self.ask.all)
        return paid, time.process_time() - clock

    def _greedy(self, cache: Cache) -> list[float]:
        """Whether the value is in what the model writes, question by question."""
        if not self.by.greedy or not self.ask.questions:
            return []
        pad, ends = pad_and_ends(self.by.model, self.by.tokenizer)
        count, limit = len(self.ask.questions), self.by.limit or max(map(len, self.ask.answers)) + 2
        with cache.fork() as own:
            own.batch_repeat_interleave(count)
            seen = torch.ones(count, self.length, dtype=torch.int64, device=self.by.model.device)
            rows = answer(self.by.model, own, seen, self.ask.questions, limit, pad, ends)
        texts = (decode(self.by.tokenizer, row) for row in rows)
        return [found(text, [value]) for text, value in zip(texts, self.values, strict=True)]
