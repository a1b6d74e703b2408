"""Texts that were read once. Every method evicts a fork of what was read; a second pass serves all that need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import protected, second_pass_scores
from lkv.evaluate.methods import FLOOR, FULL, Method
from lkv.hf import Cache
from lkv.hf.observation import observe
from lkv.policies import Policy, Repetition
from lkv.policies.base import scores_once
from lkv.policies.streaming_llm import StreamingLLM
from lkv.second_pass import in_words, repetition_of

SINK, WINDOW = 4, 32  # rows that the floor keeps


def needs_of(methods: Iterable[Method]) -> frozenset[str]:
    """What a cache has to observe for these methods."""
    return frozenset().union(*(m.policy.needs for m in methods if m.policy is not None))


def repetitions(methods: Iterable[Method]) -> set[Repetition]:
    """The ways in which these methods want a text to be repeated."""
    return {repetition_of(m.policy) for m in methods if m.second_pass and m.policy is not None}


class Forks:
    """
    Args:
        whole: a cache that holds all rows of the texts, with what the methods need observed.
        tokens: `[B, n]`, the texts.
        clock: in seconds.
        begin: how many tokens at the beginning of each text are no part of it, but of a chat template: a second pass
            does not repeat them, and its methods keep them, as the authors of KVzip do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        whole: Cache,
        tokens: Tensor,
        *,
        clock: Callable[[], float],
        begin: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.whole, self.tokens = model, tokenizer, whole, tokens
        self.begin, self.clock = begin, clock
        self._passes: dict[Repetition, tuple[list[Tensor], float]] = {}

    def second_pass(self, method: Method) -> tuple[list[Tensor] | None, float]:
        """Scores `[B, H, n]` per layer and the seconds that they took; None for a method that needs no second pass.

        Methods that repeat the texts in the same way share one, and its time is that of each.
        """
        if not method.second_pass:
            return None, 0.0
        scorer = method.scorer
        assert scorer is not None  # the full cache has no second pass
        scorer = in_words(scorer, self.tokenizer)
        how = repetition_of(scorer)
        if how not in self._passes:
            clock = self.clock()
            scores = second_pass_scores(self.model, self.whole, self.tokens, scorer, begin=self.begin)
            self._passes[how] = scores, self.clock() - clock
        return self._passes[how]

    def scores(self, method: Method) -> tuple[list[Tensor] | None, float]:
        """What a method makes of its observations, and the seconds of that; they are the same at all retentions.

        None for the full cache and the floor, and for methods that look at a layer again when they know the budgets.
        """
        if method.policy is None or not scores_once(method.policy):
            return None, 0.0
        clock, policy = self.clock(), method.policy
        observed = (observe(layer, policy.needs, policy.window) for layer in self.whole.ragged)
        scores = [policy.score(layer.rank[0], seen) for layer, seen in zip(self.whole.ragged, observed, strict=True)]
        return scores, self.clock() - clock

    def evicted(self, method: Method, retention: float, scores: Sequence[Tensor] | None = None) -> tuple[Cache, float]:
        """A fork of which the method has evicted, and the seconds of the eviction.

        Args:
            scores: `[B, H, n]` per layer; None: the method scores what was observed.
        """
        cache = self.whole.fork()
        clock = self.clock()
        evict(cache, method, retention, scores, self.begin)
        return cache, self.clock() - clock


def evict(cache: Cache, method: Method, retention: float, scores: Sequence[Tensor] | None, begin: int = 0) -> None:
    if method.name == FULL:
        return
    if method.name == FLOOR:
        cache.evict(StreamingLLM(SINK), budget=SINK + WINDOW)
    else:
        cache.evict(policy_of(method, begin), retention=retention, scores=scores)


def policy_of(method: Method, begin: int) -> Policy | None:
    """The policy, which keeps the first `begin` rows of all heads if it has a second pass."""
    return protected(method.policy, begin) if method.second_pass and method.policy is not None else method.policy


def rows_of_heads(cache: Cache) -> list[list[int]]:
    """Rows `[N, H]` of a cache of one sequence, counted in the cache itself."""
    return [
        [layer.row_counts[0] // layer.heads] * layer.heads if layer.rows is None else layer.rows.lengths[0].tolist()
        for layer in cache.ragged
    ]
