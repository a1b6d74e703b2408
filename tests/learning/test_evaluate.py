"""What `evaluate` reads, evicts, counts and times: every token once, every method the same texts, each its own rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import tasks
from lkv.cli import eval as command
from lkv.evaluate import forks, run
from lkv.evaluate.methods import FLOOR, FULL, Method, choose, heuristics, learned
from lkv.evaluate.run import Result, Setting, evaluate
from lkv.hf import Cache
from lkv.policies.kvzip import KVzip, Repetition
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.snapkv import SnapKV
from lkv.policies.streaming_llm import StreamingLLM
from lkv.text import encode

SETTING = Setting(retentions=(0.5, 0.8), batch=2, limit=3)
LENGTHS = (100, 128, 113, 90, 121)
# Not LKV: the same word twice has one score in the first layer, and rounding decides which of the two is kept.
METHODS = choose([FULL, FLOOR, "random", "streaming_llm", "snapkv", "adakv", "kvzip"], heuristics())

Evaluate = Callable[..., list[Result]]


@pytest.fixture
def samples() -> list[tasks.Sample]:
    """Questions of three sizes, texts of five, numbers that are no places in the list."""
    names = ("multi_key", "multi_query", "multi_value", "key_value", "multi_query")
    return [tasks.make(task, 7 + 3 * i, length) for i, (task, length) in enumerate(zip(names, LENGTHS, strict=True))]


@pytest.fixture
def results(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Evaluate:
    def call(samples: Sequence[tasks.Sample], methods: Sequence[Method] = METHODS, **setting: object) -> list[Result]:
        return list(evaluate(model, tokenizer, samples, methods, replace(SETTING, **setting)))

    return call


@pytest.fixture
def calls(model: PreTrainedModel) -> Iterator[list[list[list[int]]]]:
    """For every call of the decoder the tokens that are not padding, row by row."""
    seen: list[list[list[int]]] = []

    def record(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (tokens,) = args
        mask = kwargs.get("attention_mask")
        present = torch.ones_like(tokens) if mask is None else mask[:, -tokens.shape[1] :]
        seen.append([row[there.bool()].tolist() for row, there in zip(tokens, present, strict=True)])

    hook = model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, list[list[list[int]]]]]:
    """For every cache that is answered from: which tokens are not padding, and the positions of each head."""
    seen = []
    own = run.answer

    def watched(model: object, cache: Cache, present: Tensor, *args: object) -> list[list[int]]:
        rows: list[list[list[int]]] = [[] for _ in present]
        for layer in cache.ragged:
            kept = layer.rows
            spans = zip(kept.cu_seqlens.tolist(), kept.lengths.flatten().tolist(), strict=False)
            for i, (begin, length) in enumerate(spans):
                rows[i // layer.heads].append(kept.positions[begin : begin + length].tolist())
        seen.append((present, rows))
        return own(model, cache, present, *args)

    monkeypatch.setattr(run, "answer", watched)
    return seen


@pytest.mark.parametrize("see", [False, True])
def test_the_question_is_read_once_and_compressed_only_on_demand(
    results: Evaluate, samples: list[tasks.Sample], tokenizer: PreTrainedTokenizerBase, calls: list, see: bool
) -> None:
    results(samples, choose([FULL, "streaming"], heuristics()), see_question=see, limit=1)
    # Per batch: the texts, and one call per method and retention, as one token is answered.
    per_batch = 1 + 1 + 2
    assert len(calls) == 3 * per_batch
    for begin in range(0, 5, 2):
        part = samples[begin : begin + 2]
        read, *answered = calls[begin // 2 * per_batch :][:per_batch]
        for b, sample in enumerate(part):
            context = encode(tokenizer, sample.context, begins=True)
            question = encode(tokenizer, sample.question)
            assert tokenizer.bos_token_id not in context[1:] + question and len(question) > 2
            behind = question[-1:] if see else question
            assert read[b] == context + (question[:-1] if see else [])
            assert all(call[b] == behind for call in answered)


def test_the_full_cache_answers_as_generate_does(
    results: Evaluate, samples: list[tasks.Sample], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    for sample, result in zip(samples, results(samples, METHODS[:1], limit=5), strict=True):
        prompt = encode(tokenizer, sample.context, begins=True) + encode(tokenizer, sample.question)
        out = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert result.text == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_every_method_keeps_what_it_was_allowed(
    results: Evaluate, samples: list[tasks.Sample], model: PreTrainedModel
) -> None:
    torch.manual_seed(5)
    policies = heuristics() | learned(Design(hidden=8).build(Shape.of(model)))
    got = results(samples, choose([FULL, FLOOR, *policies], policies))
    assert len(got) == 5 * (1 + 2 * (1 + len(policies)))
    for result in got:
        length = LENGTHS[(result.index - 7) // 3] + 1
        rows = {FULL: length, FLOOR: 36}.get(result.method, round(result.retention * length))
        assert result.kept == pytest.approx(rows / length), result
        assert (result.second_pass_seconds > 0) == ("kvzip" in result.method)


def test_every_method_answers_the_same_samples_in_their_order(results: Evaluate, samples: list[tasks.Sample]) -> None:
    groups = run.by_method(results(samples))
    assert list(groups)[:3] == [(FULL, 1.0), (FLOOR, 0.5), (FLOOR, 0.8)] and len(groups) == 1 + 2 * 6
    expected = [(s.task, s.index) for s in samples]
    assert all([(r.task, r.index) for r in group] == expected for group in groups.values())


def facts(results: list[Result]) -> dict[tuple[object, ...], tuple[str, float]]:
    return {(r.task, r.index, r.method, r.retention): (r.text, round(r.kept, 9)) for r in results}


@pytest.mark.parametrize("see", [False, True])
def test_batches_do_not_matter(results: Evaluate, samples: list[tasks.Sample], see: bool) -> None:
    methods = [m for m in METHODS if m.name in (FULL, "streaming_llm", "snapkv", "kvzip")]
    alone = facts(results(samples, methods, see_question=see, batch=1, retentions=(0.5,)))
    assert len(alone) == 5 * 4
    for batch in (2, 16):
        assert facts(results(samples, methods, see_question=see, batch=batch, retentions=(0.5,))) == alone, batch


def test_methods_do_not_touch_each_other(results: Evaluate, samples: list[tasks.Sample]) -> None:
    together = facts(results(samples[:3]))
    assert len(together) == 3 * 13
    assert facts(results(samples[:3], METHODS[::-1], retentions=(0.8, 0.5))) == together
    apart = {}
    for method in METHODS:
        apart |= facts(results(samples[:3], [method]))
    assert apart == together


def test_nor_do_learned_ones(results: Evaluate, samples: list[tasks.Sample], model: PreTrainedModel) -> None:
    """In batches of one, so that rounding is the same."""
    torch.manual_seed(5)
    policies = heuristics() | learned(Design(hidden=8).build(Shape.of(model)))
    methods = choose(["lkv", "uniform+lkv-t", "lkv-h+snapkv", "lkv-h+kvzip", "uniform+kvzip", "kvzip"], policies)
    together = facts(results(samples[:2], methods, batch=1, retentions=(0.5,)))
    alone = [facts(results(samples[:2], [method], batch=1, retentions=(0.5,))) for method in methods[::-1]]
    assert {key: fact for part in alone for key, fact in part.items()} == together


def test_rows_that_are_answered_from(results: Evaluate, samples: list[tasks.Sample], caches: list) -> None:
    """The floor is the first 4 and the last 32 tokens of a text; streaming keeps as many as it may."""
    got = results(samples[:2], choose([FLOOR, "streaming_llm"], heuristics()))
    assert len(caches) == 2 + 2
    for k, (present, rows) in enumerate(caches):
        for b, there in enumerate(present.tolist()):
            places = [i for i, x in enumerate(there) if x]
            n = len(places)
            assert n == LENGTHS[b] + 1
            keep = [36, 36, round(0.5 * n), round(0.8 * n)][k]
            expected = places[:4] + places[n - keep + 4 :]
            assert len(rows[b]) == 3 * 2 and all(head == expected for head in rows[b])
            assert got[2 * k + b].kept == pytest.approx(keep / n)


def test_kept_is_counted_in_the_cache(
    results: Evaluate, samples: list[tasks.Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a method keeps other numbers of rows than the retention, the result has them, text by text."""
    monkeypatch.setattr(forks, "evict", lambda cache, method, *rest: cache.evict(StreamingLLM(2), budget=20))
    for result in results(samples, choose(["snapkv"], heuristics())):
        length = LENGTHS[(result.index - 7) // 3] + 1
        assert result.kept == pytest.approx(20 / length), result
    monkeypatch.setattr(forks, "evict", lambda *rest: None)
    assert all(r.kept == 1.0 for r in results(samples, choose(["snapkv", FLOOR], heuristics())))


def test_heads_of_different_budgets_are_counted_together(results: Evaluate, samples: list, caches: list) -> None:
    got = results(samples[:2], choose(["adakv"], heuristics()), retentions=(0.5,))
    ((present, rows),) = caches
    for b, result in enumerate(got):
        sizes = list(map(len, rows[b]))
        assert len(set(sizes)) > 1
        assert result.kept == pytest.approx(sum(sizes) / (6 * int(present[b].sum())))


class TestTimes:
    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A second of the CPU goes by whenever somebody looks."""
        ticks = itertools.count()
        monkeypatch.setattr(run.time, "process_time", lambda: float(next(ticks)))

    def test_are_those_of_a_batch_shared_by_its_samples(self, results: Evaluate, samples: list[tasks.Sample]) -> None:
        """The last batch, of one sample, is its alone."""
        for result in results(samples, choose([FLOOR, "snapkv"], heuristics())):
            assert result.evict_seconds == (1.0 if result.index == samples[-1].index else 0.5)
            assert result.second_pass_seconds == 0.0

    def test_of_a_second_pass_are_reported_for_each_method_that_uses_it(
        self, results: Evaluate, samples: list[tasks.Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes = []
        own = forks.second_pass_scores
        monkeypatch.setattr(
            forks, "second_pass_scores", lambda *args, **more: passes.append(args[-1]) or own(*args, **more)
        )
        methods = [Method("kvzip", KVzip()), Method("snapkv", SnapKV()), Method("equal", KVzip(across=None))]
        for result in results(samples, methods):
            share = 1.0 if result.index == samples[-1].index else 0.5
            assert result.evict_seconds == share
            assert result.second_pass_seconds == (0.0 if result.method == "snapkv" else share), result
        assert len(passes) == 3  # one per batch
        passes.clear()
        other = KVzip(repetition=Repetition(chunk=40))
        list(results(samples, [*methods, Method("in chunks", other)]))
        assert len(passes) == 6 and {policy.repetition.chunk for policy in passes} == {2000, 40}


def test_metric_is_that_of_the_setting(results: Evaluate, samples: list[tasks.Sample]) -> None:
    requests = []

    def metric(text: str, sample: tasks.Sample) -> float:
        requests.append((text, sample))
        return sample.index / 100

    got = results(samples, METHODS[:2], metric=metric)
    assert [r.score for r in got] == [r.index / 100 for r in got]
    assert [(text, sample.index) for text, sample in requests] == [(r.text, r.index) for r in got]


@pytest.mark.parametrize(
    ("text", "expected", "share"),
    [
        ("41 87 . 12 34", ("41 87", "12 34"), 1),
        ("12 34 . 41 87", ("41 87", "12 34"), 1),  # in any order
        ("41 87 .", ("41 87", "12 34"), 0.5),
        ("41 87 . 41 87", ("41 87", "12 34", "55 66", "77 88"), 0.25),
        ("kara and BALA", ("Bala", "KARA"), 1),  # in any case
        ("41 8", ("41 87",), 0),
        ("", ("41 87",), 0),
    ],
)
def test_share_of_expected_strings_that_are_found(
    samples: list[tasks.Sample], text: str, expected: tuple[str, ...], share: float
) -> None:
    assert run.found(text, expected) == share
    assert Setting().metric(text, replace(samples[0], expected=expected)) == share


def test_special_tokens_are_no_text(results: Evaluate, samples: list[tasks.Sample], model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()  # always the first token, which is <pad>
    assert {r.text for r in results(samples[:1], METHODS[:1])} == {""}


def test_setting_by_default_is_that_of_the_command() -> None:
    setting, given = Setting(), command.parse([])
    assert setting.retentions == tuple(given.retentions) == (0.05, 0.1, 0.15, 0.3)
    assert (setting.batch, setting.limit, setting.see_question) == (given.batch, 24, False) == (16, 24, False)


@pytest.mark.parametrize("empty", ["context", "question"])
def test_nothing_to_read_is_refused(
    results: Evaluate, samples: list[tasks.Sample], tokenizer: PreTrainedTokenizerBase, empty: str
) -> None:
    if empty == "context":
        tokenizer.bos_token, begins = None, tokenizer.bos_token
    wrong = replace(samples[1], **{empty: ""})
    try:
        with pytest.raises(ValueError, match=f"expected a {empty} of one or more tokens, got none: multi_query 10"):
            results([samples[0], wrong], METHODS[:1])
    finally:
        if empty == "context":
            tokenizer.bos_token = begins
