"""Texts that are read once, evicted, and asked: `lkv.compress`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conversation import turn
from families import FAMILIES, HEADS, SPECIAL, WITHOUT_WINDOWS, build, call, selected, tokens
from masked import masked_logits, recorded
from torch import Tensor

import lkv
from lkv.compression import prefill, second_pass_scores
from lkv.hf.versions import RecurrentLayer
from lkv.policies import AdaKV, KVzip, SnapKV, StreamingLLM
from lkv.policies.kvzip import Repetition

SHORT = Repetition(chunk=16, lead=5, first=(9, 4), later=(8,), suffix=(7,), sink=3)
POLICIES = {
    "snapkv": SnapKV(window=4),
    "adakv": AdaKV(SnapKV(window=4)),
    "kvzip": KVzip(repetition=SHORT),
    "equal kvzip": KVzip(across=None, repetition=SHORT),
}
RECURRENT = ("qwen3_next", "qwen3_5", "jamba", "nemotron_h")
HALF = dict(retention=0.5, budget=20)  # of 40 tokens
LENGTHS = {"one": [47], "padded": [47, 31, 9, 40]}
WHOLE = [name for name in selected(WITHOUT_WINDOWS) if name in FAMILIES] + ["mixtral"]  # full attention in all layers


def mask_of(text: object) -> Tensor | None:
    return text.mask if bool((text.mask == 0).any()) else None


def positions(cache: lkv.Cache, b: int = 0) -> list[list[list[int]]]:
    """Of every layer and head of a sequence."""
    found = []
    for layer in cache.ragged:
        rows = layer.rows.padded(layer.rows.positions)[b].tolist()
        found.append([head[:count] for head, count in zip(rows, layer.rows.lengths[b].tolist(), strict=True)])
    return found


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("policy", ["snapkv", "adakv"])
# Older transformers lack some of the special ones; test_families.py says which are refused there.
@pytest.mark.parametrize("family", [*selected(FAMILIES), *(() if RecurrentLayer is None else SPECIAL)])
def test_a_question_is_read_on_the_rows_that_are_left(family: str, policy: str, lengths: list[int]) -> None:
    recurrent = family in RECURRENT
    if recurrent and len(lengths) > 1:
        pytest.skip("recurrent states count padding")
    model, text, question = build(family), turn(lengths, 0), tokens(len(lengths), 6, seed=3)
    cache = lkv.compress(model, text.ids, POLICIES[policy], retention=0.4, attention_mask=mask_of(text))
    for layer in cache.ragged:
        assert layer.row_counts == [HEADS * max(1, round(0.4 * n)) for n in lengths]
    whole, mask = torch.cat([text.ids, question], 1), torch.cat([text.mask, torch.ones_like(question)], 1)
    with recorded(cache, *whole.shape) as recorder, torch.no_grad():
        # Some of transformers' recurrent layers begin anew where several tokens follow.
        seen = None if mask_of(text) is None else mask
        logits = torch.cat([call(model, part, seen, cache) for part in question.split(1 if recurrent else 6, 1)], 1)
    expected = masked_logits(model, whole, mask, recorder.visible)[:, -6:]
    close = 1e-2 if recurrent else 1e-3
    torch.testing.assert_close(logits, expected, rtol=close, atol=close)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("family", WHOLE)
def test_the_rows_of_a_second_pass_are_the_best_of_all_heads(family: str, lengths: list[int]) -> None:
    model, text = build(family), turn(lengths, 0)
    cache = lkv.compress(model, text.ids, POLICIES["kvzip"], retention=0.3, attention_mask=mask_of(text))
    for b, length in enumerate(lengths):
        alone = text.ids[b : b + 1, -length:]
        scores = torch.stack(second_pass_scores(model, prefill(model, alone), alone, POLICIES["kvzip"]))[:, 0]
        scores[..., :4] = 2.0  # the sink
        kept = [[[p - len(text.ids[b]) + length for p in head] for head in layer] for layer in positions(cache, b)]
        total = len(cache.ragged) * HEADS * max(1, round(0.3 * length))
        mine = torch.zeros_like(scores, dtype=torch.bool)
        for layer, heads in enumerate(kept):
            for head, rows in enumerate(heads):
                mine[layer, head, rows] = True
        assert int(mine.sum()) == total
        # Beside others, sums come in another order: nothing that is left out is clearly better than what is kept.
        assert scores[~mine].max() <= scores[mine].min() * (1 + 1e-4) + 1e-6


def test_without_a_second_pass_it_is_a_cache_with_that_policy() -> None:
    model, ids = build("llama"), tokens(2, 40)
    cache = lkv.compress(model, ids, "snapkv", retention=0.5)
    other = lkv.Cache(model, "snapkv", retention=0.5)
    with torch.no_grad():
        call(model, ids, None, other)
    assert positions(cache) == positions(other) and positions(cache, 1) == positions(other, 1)
    for policy in ("snapkv", "kvzip"):
        halves = [positions(lkv.compress(model, ids, policy, **{name: x})) for name, x in HALF.items()]
        assert halves[0] == halves[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_comes_later_stays(policy: str) -> None:
    model, ids, question = build("llama"), tokens(1, 40), tokens(1, 9, seed=1)
    cache = lkv.compress(model, ids, POLICIES[policy], retention=0.25)
    before = positions(cache)
    with cache.fork() as own, torch.no_grad():
        whole = torch.cat([ids, question], 1)
        answer = model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=own, max_new_tokens=5)
        added = [*range(40, answer.shape[1] - 1)]
        assert positions(own) == [[head + added for head in layer] for layer in before]
    assert positions(cache) == before


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("policy", [*POLICIES, "streaming", "random"])
def test_protected_tokens_stay_in_every_head(policy: str, lengths: list[int]) -> None:
    model, text = build("llama"), turn(lengths, 0)
    chosen = {**POLICIES, "streaming": StreamingLLM(sink=2), "random": "random"}[policy]
    options = dict(attention_mask=mask_of(text), retention=0.7)
    cache = lkv.compress(model, text.ids, chosen, protect=6, **options)
    for b, length in enumerate(lengths):
        begin = text.ids.shape[1] - length
        for heads in positions(cache, b):
            assert all(rows[:6] == [*range(begin, begin + 6)] for rows in heads)
    total = [sum(layer.row_counts[b] for layer in cache.ragged) for b in range(len(lengths))]
    assert total == [2 * HEADS * round(0.7 * n) for n in lengths]


def test_protected_tokens_are_not_repeated() -> None:
    """The rows before them are those of a text that begins behind them, and their sinks are part of the softmax."""
    model, ids = build("llama"), tokens(1, 40)
    seen = []

    @dataclass(frozen=True)
    class Noted(KVzip):
        def budgets(self, scores, lengths, total, *, starts=None):
            seen.append((self.sink, [s.clone() for s in scores]))
            return super().budgets(scores, lengths, total, starts=starts)

    lkv.compress(model, ids, Noted(repetition=SHORT), retention=0.5, protect=7)
    ((sink, scores),) = seen
    wanted = second_pass_scores(model, prefill(model, ids), ids, KVzip(repetition=SHORT), begin=7)
    assert sink == 7
    for got, expected in zip(scores, wanted, strict=True):
        assert torch.equal(got, expected) and (got[..., :7] == 0).all() and (got[..., 7:] > 0).all()


class Bare:
    """A policy from outside, without settings."""

    needs, scope, sink, window = frozenset(), "layer", 0, 0

    def score(self, layer, observation):
        return observation.ranks().float()

    def budgets(self, scores, lengths, total, *, starts=None):
        return SnapKV().budgets(scores, lengths, total)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=tokens(1, 40)[0]), r"expected ids of shape \[B, n\], .*, got torch.int64 \[40\]"),
        (dict(ids=tokens(1, 40).float()), r"expected ids of shape \[B, n\], .*, got torch.float32 \[1, 40\]"),
        (dict(ids=[[1, 2]]), r"expected ids of shape \[B, n\], .*, got list"),
        (dict(ids=tokens(1, 0)), r"expected ids of shape \[B, n\], .*, got torch.int64 \[1, 0\]"),
        (dict(attention_mask=torch.ones(1, 39)), r"expected attention_mask of shape .* \[1, 40\], got \[1, 39\]"),
        (dict(attention_mask=torch.zeros(1, 40)), r"expected one token or more of each text, got \[0\]"),
        (dict(protect=21), r"expected protect in \[0, 20\], .*, got 21"),
        (dict(protect=-1), r"expected protect in \[0, 20\], .*, got -1"),
        (dict(policy=Bare(), protect=1), r"expected a policy with a setting `sink` .*, got .*Bare"),
        (dict(policy="snap"), r"lkv.policies: expected one of .*, got 'snap'"),
        (dict(retention=1.5), r"expected retention in \(0, 1\], got 1.5"),
        (dict(retention=None), r"expected retention, budget or cap, got none of them"),
        (dict(budget=3), r"expected one of retention and budget, got both"),
        (dict(policy="kvzip", retention=1.5), r"expected retention in \(0, 1\], got 1.5"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else None,
)
def test_bad_input_is_refused_before_the_model_reads(
    change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    given = dict(ids=tokens(1, 40), policy="snapkv", retention=0.5) | change
    calls = []
    hook = model.model.register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        with pytest.raises(ValueError, match=message):
            lkv.compress(model, **given)
    finally:
        hook.remove()
    assert not calls


def test_a_text_longer_than_the_model_reads_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Padding does not count."""
    model, ids = build("llama"), tokens(2, 40)
    monkeypatch.setattr(model.config, "max_position_embeddings", 30)
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    lkv.compress(model, ids, retention=0.5, attention_mask=mask)
    assert not recwarn.list
    mask[1, 9] = 1
    with pytest.warns(UserWarning, match="expected texts of at most the 30 tokens that the model reads, got one of 31"):
        lkv.compress(model, ids, retention=0.5, attention_mask=mask)


def test_a_second_pass_needs_whole_rows_and_the_same_texts() -> None:
    model, ids = build("llama"), tokens(1, 40)
    for cut in (slice(10, 20), slice(30, 40)):  # padding between tokens, and behind them
        mask = torch.ones_like(ids)
        mask[:, cut] = 0
        with pytest.raises(ValueError, match="expected a cache that holds all rows of a text, with padding in front"):
            lkv.compress(model, ids, "kvzip", retention=0.5, attention_mask=mask)
    with pytest.raises(ValueError, match=r"expected tokens of shape \[B, n\] = \[1, 40\], got \[1, 39\]"):
        second_pass_scores(model, prefill(model, ids), ids[:, 1:], KVzip())
    with pytest.raises(ValueError, match="expected a cache that holds all rows"):
        second_pass_scores(model, lkv.compress(model, ids, retention=0.5), ids, KVzip())
    with pytest.raises(ValueError, match="expected a cache that holds all rows"):
        second_pass_scores(model, lkv.Cache(model, retention=0.5), ids, KVzip())
    for family in ("gemma2", "gemma3"):
        with pytest.raises(ValueError, match="expected a model of full attention in all 4 layers"):
            lkv.compress(build(family), ids, "kvzip", retention=0.5)


def test_the_quickstart_runs() -> None:
    blocks = (Path(__file__).parents[2] / "docs/quickstart.md").read_text().split("```python\n")
    (block,) = (x.split("```")[0] for x in blocks if "lkv.compress" in x)
    document, questions = tokens(1, 200), [tokens(1, 3, seed=4), tokens(1, 5, seed=5)]
    known = dict(unk_token_id=None, chat_template=None, bos_token_id=None)

    class Tokenizer(SimpleNamespace):
        def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[2 + ord(x) % 60 for x in text])

    names = dict(lkv=lkv, torch=torch, model=build("llama"), tokenizer=Tokenizer(**known))
    exec(block, names := names | dict(document=document, questions=questions))
    rows = [sum(layer.row_counts) for layer in names["cache"].ragged]
    assert sum(rows) == 2 * HEADS * 30 and all(
        head[:24] == [*range(24)] for x in positions(names["cache"]) for head in x
    )


def test_a_cache_alone_has_no_second_pass() -> None:
    with pytest.raises(ValueError, match=r"needs a second pass over its text.*: lkv.compress\(model, ids, policy"):
        lkv.Cache(build("llama"), "kvzip", retention=0.5)
