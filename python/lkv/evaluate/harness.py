"""EleutherAI's lm-eval harness on a cache that was evicted: its model class for Hugging Face, with `lkv.Cache`.

A prompt of the harness is one string, so the caller has to define its question: see `Compression`. What comes before is
read, evicted for good, and the rest of the prompt, the continuation or the answer come after, from the rows that are
left. Prompts are run one at a time, as each has its own cut; continuations of one prompt share its eviction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.compression import compress, prefill
from lkv.hf import Cache
from lkv.policies import Policy
from lkv.policies.streaming_llm import StreamingLLM


@dataclass(frozen=True)
class Compression:
    """What of a prompt is compressed, and how.

    Attributes:
        policy: None for the full cache.
        retention: rows to keep of what is compressed, in (0, 1].
        see_question: compress the whole prompt, but for its last token, from which the answer is decoded.
        question_tokens: otherwise the last tokens of a prompt, taken for its question, are not compressed; or
        marker: the question begins at the last occurrence of this text.
    """

    policy: Policy | None
    retention: float = 1.0
    see_question: bool = False
    question_tokens: int = 64
    marker: str | None = None

    def __str__(self) -> str:
        if self.see_question:
            return "question seen by the compression: all of a prompt is compressed but its last token"
        question = f"its last {self.question_tokens} tokens"
        if self.marker is not None:
            question = f"what begins with the last {self.marker!r}"
        return f"question not seen by the compression: all of a prompt is compressed but {question}"


@dataclass
class Totals:
    """What came of it.

    Attributes:
        prompts: that were run. short: of these, those with nothing in front of the question, which nothing was evicted
            of. kept, rows: of all heads and layers, after the evictions and before.
    """

    prompts: int = 0
    short: int = 0
    kept: int = 0
    rows: int = 0

    def __str__(self) -> str:
        share = f"{self.kept / self.rows:.1%} of the rows" if self.rows else "no rows"
        return f"{self.prompts} prompts, {self.short} too short to be compressed; of the others {share} kept"


@register_model("lkv")
class HarnessModel(HFLM):
    """A model of transformers for `lm_eval.simple_evaluate`.

    Attributes:
        totals: of all prompts so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compression: Compression,
        max_length: int | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)
        self.compression, self.totals = compression, Totals()
        self._cache: Cache | None = None  # of the prompt before, evicted
        self._read: list[int] = []  # its tokens

    def close(self) -> None:
        """Lets the rows of the last prompt go."""
        self._cache = None

    def cut(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt are compressed; the others are its question.

        Raises:
            ValueError: for a prompt without the marker.
        """
        how = self.compression
        if how.see_question:
            return len(prompt) - 1
        if how.marker is None:
            return max(0, len(prompt) - how.question_tokens)

        def ends_with_question(begin: int) -> bool:
            return how.marker in self.tokenizer.decode(prompt[begin:])

        if not ends_with_question(0):
            end = self.tokenizer.decode(prompt[-20:])
            raise ValueError(f"lkv lm-eval: expected {how.marker!r} in every prompt, got one that ends with {end!r}")
        low, high = 0, len(prompt)  # the marker is in prompt[low:], and no longer in prompt[high:]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if ends_with_question(middle) else (low, middle)
        return low

    def evicted(self, tokens: list[int]) -> Cache:
        """A cache of these tokens, of which the policy has chosen; a copy."""
        if self._cache is None or tokens != self._read:
            self.close()
            self._cache, self._read = self._evict(tokens), tokens
        return self._cache.fork()

    def _evict(self, tokens: list[int]) -> Cache:
        policy = self.compression.policy
        self.totals.prompts += 1
        if not tokens:  # a cache that keeps all of what comes
            self.totals.short += 1
            return Cache(self.model, StreamingLLM(), retention=1.0, chunks="last")
        ids = self._tensor(tokens)
        if policy is None:
            cache = prefill(self.model, ids)
        else:
            retention = self.compression.retention
            cache = compress(self.model, ids, policy, retention=retention, tokenizer=self.tokenizer)
        self.totals.rows += len(tokens) * sum(layer.heads for layer in cache.ragged)
        self.totals.kept += sum(layer.row_counts[0] for layer in cache.ragged)
        return cache

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.device)

    # What the harness calls.

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: object) -> Tensor:
        """`[1, n]` tokens of a prompt: they and what comes after them."""
        tokens = context[0].tolist()
        with self.evicted(tokens[: self.cut(tokens)]) as cache:
            return super()._model_generate(context, max_length, stop, past_key_values=cache, **kwargs)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For every continuation: the logarithm of its probability after its prompt, and whether it is the likeliest.

        Raises:
            ValueError: for a continuation that is longer than what the model reads, and see `cut`.
        """
        answers = []
        for key, prompt, continuation in tqdm(requests, "lkv lm-eval: loglikelihood", disable=disable_tqdm):
            if len(continuation) > self.max_length:
                most = f"at most {self.max_length} tokens, as many as the model reads"
                raise ValueError(f"lkv lm-eval: expected continuations of {most}, got one of {len(continuation)}")
            prompt = prompt[max(0, len(prompt) + len(continuation) - self.max_length - 1) :]
            cut = self.cut(prompt)
            with self.evicted(prompt[:cut]) as cache:
                ids, wanted = self._tensor(prompt[cut:] + continuation[:-1]), self._tensor(continuation)
                output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=len(continuation))
            logits = output.logits.float().log_softmax(-1)
            total = logits.gather(2, wanted[..., None]).sum()
            answers.append((float(total), bool((logits.argmax(-1) == wanted).all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """
        Raises:
            ValueError: always: a text that is all scored has no prompt that could be compressed.
        """
        raise ValueError("lkv lm-eval: expected tasks with a prompt, got one of rolling loglikelihood")
