"""What is measured on a passage, against a dense model that masks what was evicted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_texts import files, model, tokenizer
from torch import Tensor

from lkv.compression import compress, prefill
from lkv.evaluate.forced import foretold
from lkv.evaluate.forks import Forks
from lkv.evaluate.methods import FULL, Method, choose, heuristics, learned
from lkv.evaluate.oracle import ORACLES, Oracle
from lkv.evaluate.results import Cell
from lkv.evaluate.texts import Ask, Judge
from lkv.hf import Cache
from lkv.learn import targets
from lkv.learn.dialogue import Exchange, exchange
from lkv.passes import Context, follow
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.tasks.documents import documents
from lkv.tasks.passages import Passage, passage

MODEL, TOKENIZER = model(), tokenizer()
torch.manual_seed(5)
LKV = Design(hidden=4, scale="absolute").build(Shape.of(MODEL))
THRESHOLD = Design(hidden=4, scale="absolute", budget="threshold").build(Shape.of(MODEL))
for _module in (LKV.budget, THRESHOLD.budget):
    for _parameter in _module.logits.parameters():
        torch.nn.init.normal_(_parameter)
KNOWN = heuristics() | ORACLES | learned(LKV, {"threshold": THRESHOLD})
NAMES = [FULL, *ORACLES, "lkv", "threshold", "kvzip", "snapkv", "adakv", "random", "streaming_llm", "uniform+kvzip"]
METHODS = choose(NAMES, KNOWN)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Passage:
    found = documents(files(tmp_path_factory.mktemp("texts")))
    return passage(found, 1, 420, lambda x: len(x.encode()), split="test", facts=3, continuation=20)


@pytest.fixture(scope="module")
def talk(text: Passage) -> Exchange:
    return exchange(TOKENIZER, text, 21)


@pytest.fixture
def evicted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float, list[Tensor]]]]:
    """For every eviction the method, the retention and per layer a log-mask `[1, H, n]`: 0 for the rows that stay."""
    seen = []
    own = Forks.evicted

    def watched(self: Forks, method: Method, retention: float, *rest: object) -> tuple[Cache, float]:
        cache, seconds = own(self, method, retention, *rest)
        masks = []
        for layer in cache.ragged:
            mask = torch.full((1, layer.heads, self.tokens.shape[1]), -torch.inf)
            if layer.rows is None:
                mask.zero_()
            else:
                places = layer.rows.padded(layer.rows.positions)[0]
                for head, count in enumerate(layer.rows.lengths[0].tolist()):
                    mask[0, head, places[head, :count].long()] = 0.0
            masks.append(mask)
        seen.append((method.name, retention, masks))
        return cache, seconds

    monkeypatch.setattr(Forks, "evicted", watched)
    yield seen


def dense(tokens: list[int], masks: list[Tensor] | None, question: list[int], reply: list[int]) -> Tensor:
    """Log-probabilities `[tokens of the reply, V]` of a dense model, by a mask on the rows of the text."""
    layers = MODEL(torch.tensor([tokens]), use_cache=True).past_key_values.layers
    context = Context(tuple(x.keys for x in layers), tuple(x.values for x in layers), torch.tensor([len(tokens)]))
    hidden = follow(MODEL, context, torch.tensor([[*question, *reply][:-1]]), log_masks=masks)
    return MODEL.lm_head(hidden[0, len(question) - 1 :]).log_softmax(-1)


def check(judged: dict, tokens: list[int], masks: list[Tensor], question: list[int], reply: list[int]) -> None:
    full, left = dense(tokens, None, question, reply), dense(tokens, masks, question, reply)
    wanted = torch.tensor(reply)
    assert judged["kl"] == pytest.approx(float(F.kl_div(left, full, reduction="sum", log_target=True)), abs=2e-4)
    assert judged["tokens"] == len(reply)
    assert judged["right"] == int((left.argmax(-1) == wanted).sum())
    assert judged["same"] == int((left.argmax(-1) == full.argmax(-1)).sum())
    if "exact" in judged:
        assert judged["exact"] == bool((left.argmax(-1) == wanted).all())


def judged(text: Passage, talk: Exchange, todo: list[tuple[Method, float]], **more: object) -> list[Cell]:
    return list(Judge(MODEL, TOKENIZER, METHODS, **more).cells(4, text, talk, todo))


@torch.no_grad()
def test_what_is_measured_is_what_a_mask_on_the_evicted_rows_gives(
    text: Passage, talk: Exchange, evicted: list
) -> None:
    """Of answers that are the model's own, so that some are right."""
    talk = replace(talk, answers=[dense(talk.context, None, q, a).argmax(-1).tolist() for q, a in
                                 zip(talk.questions, talk.answers, strict=True)])  # fmt: skip
    cells = judged(text, talk, [(method, 0.3) for method in METHODS])
    assert [cell.method for cell in cells] == NAMES == [name for name, _, _ in evicted]
    for cell, (_, _, masks) in zip(cells, evicted, strict=True):
        assert cell.rows == [[int((head == 0).sum()) for head in mask[0]] for mask in masks]
        for fact, question, draft in zip(cell.facts, talk.questions, talk.answers, strict=True):
            check(fact, talk.context, masks, question, draft)
        check(cell.continuation, talk.context, masks, talk.continuation[:1], talk.continuation[1:])
        assert [fact["kind"] for fact in cell.facts] == [fact.kind for fact in text.facts]
        assert (cell.tokens, cell.domain, cell.document) == (len(talk.context), text.domain, text.document)
        kept = 1 if cell.method == FULL else round(0.3 * len(talk.context)) / len(talk.context)
        assert cell.kept == pytest.approx(kept)
    spread = {cell.method: cell.continuation["kl"] for cell in cells}
    assert spread[FULL] == 0 and min(x for name, x in spread.items() if name != FULL) > 1e-3


def test_nothing_is_lost_where_all_rows_stay(text: Passage, talk: Exchange) -> None:
    for cell in judged(text, talk, [(method, 1.0) for method in METHODS]):
        for part in (*cell.facts, cell.continuation):
            assert abs(part["kl"]) < 1e-4 and part["same"] == part["tokens"]
        assert cell.kept == 1.0


@torch.no_grad()
def test_a_question_that_is_seen_is_compressed_with_the_text(text: Passage, talk: Exchange, evicted: list) -> None:
    """Each by itself; KVzip repeats it as well, and the last token stays behind."""
    talk = replace(talk, continuation=[])
    cells = judged(text, talk, [(method, 0.4) for method in METHODS], see_question=True)
    assert [name for name, _, _ in evicted] == [name for name in NAMES for _ in range(3)]
    for i, cell in enumerate(cells):
        texts = [[*talk.context, *question[:-1]] for question in talk.questions]
        assert cell.continuation is None and cell.tokens == sum(map(len, texts))
        for b, (tokens, question, draft) in enumerate(zip(texts, talk.questions, talk.answers, strict=True)):
            _, _, masks = evicted[3 * i + b]
            check(cell.facts[b], tokens, masks, question[-1:], draft)
        kept = 1 if cell.method == FULL else sum(round(0.4 * len(x)) for x in texts) / cell.tokens
        assert cell.kept == pytest.approx(kept)


@pytest.mark.parametrize("see", [False, True])
def test_methods_keep_what_they_keep_of_a_text_that_is_read_at_once(
    text: Passage, talk: Exchange, evicted: list, see: bool
) -> None:
    """As `lkv.compress` does it, the question as a part of the text where it is seen."""
    methods = choose([name for name in KNOWN if name not in ORACLES], KNOWN)
    judge = Judge(MODEL, TOKENIZER, methods, see_question=see)
    talk = replace(talk, continuation=[]) if see else talk
    assert len(list(judge.cells(4, text, talk, [(method, 0.4) for method in methods]))) == len(methods) > 20
    texts = [[*talk.context, *question[:-1]] for question in talk.questions] if see else [talk.context]
    found = iter(evicted)
    for method in methods:
        for tokens in texts:
            protect = talk.protected if method.second_pass else 0
            ids = torch.tensor([tokens])
            cache = compress(MODEL, ids, method.policy, retention=0.4, protect=protect, tokenizer=TOKENIZER)
            _, _, masks = next(found)
            for layer, mask in zip(cache.ragged, masks, strict=True):
                places = layer.rows.padded(layer.rows.positions)[0]
                for head, count in enumerate(layer.rows.lengths[0].tolist()):
                    assert torch.equal(places[head, :count].long(), (mask[0, head] == 0).nonzero()[:, 0]), method.name


@torch.no_grad()
def test_the_oracle_keeps_what_will_be_looked_at(text: Passage, talk: Exchange, evicted: list) -> None:
    judged(text, talk, [(method, 0.25) for method in METHODS if isinstance(method.policy, Oracle)])
    tokens = torch.tensor([talk.context])
    layers = MODEL(tokens, use_cache=True).past_key_values.layers
    context = Context(tuple(x.keys for x in layers), tuple(x.values for x in layers), torch.tensor([tokens.shape[1]]))
    questions = [*talk.questions, talk.continuation[:1]]
    paid = torch.stack(targets.attention(MODEL, context, questions, [*talk.answers, talk.continuation[1:]]))[:, 0]
    paid[..., :4] = paid[..., -8:] = 2.0
    (_, _, joint), (_, _, equal) = evicted
    rows = round(0.25 * tokens.shape[1])
    least = paid.flatten().sort(descending=True).values[6 * rows - 1]
    assert torch.equal(torch.cat(joint) == 0, paid >= least)
    least = paid.sort(-1, descending=True).values[..., rows - 1 : rows]
    assert torch.equal(torch.cat(equal) == 0, paid >= least)


def test_a_template_stays_where_a_text_is_repeated(text: Passage, talk: Exchange, evicted: list) -> None:
    judged(text, talk, [(method, 0.05) for method in METHODS if method.second_pass])
    assert talk.protected == 6 and len(evicted) == 2
    assert all((mask[..., :6] == 0).all() for _, _, masks in evicted for mask in masks)


@torch.no_grad()
def test_questions_together_are_as_one_by_one(talk: Exchange) -> None:
    """Of different lengths, padded on the right; whole rows and evicted ones."""
    with prefill(MODEL, torch.tensor([talk.context])) as whole:
        evicted = whole.fork()
        evicted.evict("streaming_llm", retention=0.2)
        assert len({len(q) for q in talk.questions}) > 1
        for cache in (whole, evicted):
            together = foretold(MODEL, cache, len(talk.context), talk.questions, talk.answers)
            for i, got in enumerate(together):
                part = slice(i, i + 1)
                (alone,) = foretold(MODEL, cache, len(talk.context), talk.questions[part], talk.answers[part])
                torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)
                assert got.shape == (len(talk.answers[i]), 259)


@pytest.mark.parametrize("see", [False, True])
def test_costs_are_differences_of_the_clock(
    text: Passage, talk: Exchange, see: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on by one each time that it is read, and does not begin at zero."""
    ticks = itertools.count(10_000)
    monkeypatch.setattr(time, "process_time", lambda: next(ticks))
    talk = replace(talk, continuation=[]) if see else talk
    methods = choose([FULL, "oracle", "lkv", "kvzip"], KNOWN)
    cells = judged(text, talk, [(method, 0.3) for method in methods], see_question=see)
    texts = 3 if see else 1
    for cell, method in zip(cells, methods, strict=True):
        assert cell.seconds["prefill"] == (2 * texts if see else 1)  # the question is read after the text
        assert cell.seconds["second_pass"] == (texts if method.second_pass else 0)
        assert cell.seconds["scores"] == (0 if method.second_pass or method.name == FULL else texts)
        assert cell.seconds["eviction"] == texts


def test_an_oracle_sees_no_padding() -> None:
    """Neither in front of a text nor behind it, whatever stands there."""
    scores = [torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    lengths, total = torch.tensor([[20, 20], [12, 12]]).expand(3, 2, 2), torch.tensor([6 * 15, 6 * 14])
    starts = torch.tensor([[0, 0], [5, 5]])
    wanted = Oracle().budgets([x[1:, :, 5:17] for x in scores], lengths[:, 1:], total[1:])
    for x in scores:
        x[1, :, :5] = x[1, :, 17:] = 9.0
    got = Oracle().budgets(scores, lengths, total, starts=starts)
    assert torch.equal(got[:, 1:], wanted) and (got <= lengths).all()


def test_free_answers(text: Passage, talk: Exchange) -> None:
    """Those of `generate` on the full cache hold the value or not."""
    cells = judged(text, talk, [(METHODS[0], 1.0), (METHODS[-2], 0.2)], greedy=True, limit=6)
    for fact, question, known in zip(cells[0].facts, talk.questions, text.facts, strict=True):
        prompt = torch.tensor([[*talk.context, *question]])
        out = MODEL.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        assert fact["greedy"] == float(known.value.lower() in TOKENIZER.decode(out, skip_special_tokens=True).lower())
    assert all("greedy" in fact for fact in cells[1].facts)
    longest = max(map(len, talk.answers)) + 2
    assert judged(text, talk, [(METHODS[0], 1.0)], greedy=True)[0].facts == (
        judged(text, talk, [(METHODS[0], 1.0)], greedy=True, limit=longest)[0].facts
    )
    # A value that the model does write.
    told = TOKENIZER.decode(out, skip_special_tokens=True)
    value = replace(text, facts=[replace(fact, value=told[:2]) for fact in text.facts])
    assert judged(value, talk, [(METHODS[0], 1.0)], greedy=True, limit=6)[0].facts[-1]["greedy"] == 1.0


@pytest.mark.parametrize("continuation", [[], [7]])
def test_a_continuation_of_no_more_than_its_first_token_asks_nothing(continuation: list[int]) -> None:
    assert Ask([[1, 2]], [[3]], continuation).all == ([[1, 2]], [[3]])
    assert Ask([[1, 2]], [[3]], [7, 8, 9]).all == ([[1, 2], [7]], [[3], [8, 9]])


def test_only_one_of_facts_and_continuation(text: Passage, talk: Exchange) -> None:
    todo = [(method, 0.3) for method in METHODS[:3]]
    both = judged(text, talk, todo)
    for cell, wanted in zip(judged(text, replace(talk, continuation=[]), todo), both, strict=True):
        assert cell.continuation is None and len(cell.facts) == len(wanted.facts)
    bare = replace(talk, questions=[], answers=[])
    for cell in judged(replace(text, facts=()), bare, todo):
        assert cell.facts == [] and cell.continuation["tokens"] == 20
