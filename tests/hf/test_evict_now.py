"""Eviction at a chosen moment, forks of one prompt, and budgets that all layers share."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from conversation import Turn, talk, turn
from families import FAMILIES, build, call, selected, tokens
from masked import masked_logits, recorded

import lkv
import lkv_ext
from lkv.hf.observation import observe
from lkv.policies import AdaKV, SnapKV, StreamingLLM

ADAKV = AdaKV(SnapKV(window=4))
SHAPES = {"one": ([47], [21]), "padded": ([47, 31, 9, 40], [21, 2, 17, 20])}


@dataclass(frozen=True)
class Together(SnapKV):
    """The rows of all heads of all layers compete."""

    window: int = 4

    scope = "model"

    def budgets(self, scores, lengths, total, *, starts=None):
        options = dict(lengths=lengths, starts=starts, window=self.window)
        return lkv_ext.budgets_from_scores(scores, total, across="layers", **options)


@dataclass(frozen=True)
class Hold:
    """It is not called while everything is kept."""

    needs = frozenset()
    scope = "layer"
    sink = window = 0

    def score(self, layer, observation):
        raise AssertionError

    budgets = score


class Earliest:
    """Of layer 0 a few rows of each head, of layer 1 more than there are, and none."""

    needs = frozenset()
    sink, window = 1, 2
    table = torch.tensor([[3, 5], [10**6, -1]])

    def score(self, layer, observation):
        return -observation.ranks().float()


class KnownAhead(Earliest):
    scope = "layer"

    def ahead(self, layer, rows, lengths):
        return self.table[layer].expand(len(rows), 2)

    def budgets(self, scores, lengths, total, *, starts=None):
        raise AssertionError


class KnownTogether(Earliest):
    scope = "model"

    def budgets(self, scores, lengths, total, *, starts=None):
        return self.table[:, None].expand(lengths.shape)


class Asks(SnapKV):
    """What its scores are told of the budget."""

    needs = frozenset({"queries", "budget"})

    def score(self, layer, observation):
        told.append(observation.budget.tolist())
        return super().score(layer, observation)


class AsksTogether(Asks, Together):
    scope = "model"


told: list[list[int]] = []


@pytest.fixture
def model():
    return build("llama")


@pytest.mark.parametrize("policy", [KnownAhead(), KnownTogether()], ids=lambda p: p.scope)
@pytest.mark.parametrize("packed", [False, True])
def test_budgets_of_no_row_and_of_more_than_there_are(model, packed, policy):
    """The first row, the last two and the earliest between; packed rows are fewer than the tokens."""
    prompt = turn([20, 11], 0)
    cache = lkv.Cache(model, policy, retention=0.9, chunks="last")
    talk(model, cache, [prompt])
    there = [[*range(20)], [*range(9, 20)]]
    if packed:
        cache.evict("streaming_llm", budget=8)
        there = [[*row[:4], *row[-4:]] for row in there]
    cache.evict(retention=0.2)
    few = [[[*row[: n - 2], *row[-2:]] for n in (3, 5)] for row in there]
    all_of = [[row, []] for row in there]
    assert rows(cache) == [few[0] + few[1], all_of[0] + all_of[1]]
    assert [layer.row_counts for layer in cache.ragged] == [[8, 8], [len(row) for row in there]]


def rows(cache: lkv.Cache) -> list[list[list[int]]]:
    """Positions of the rows of every layer and head."""
    kept = []
    for layer in cache.ragged:
        r, ends = layer.rows, layer.rows.cu_seqlens[:-1] + layer.rows.lengths.flatten()
        kept.append([r.positions[a:b].tolist() for a, b in zip(r.cu_seqlens.tolist(), ends.tolist(), strict=False)])
    return kept


@pytest.mark.parametrize("policy", [Together(), ADAKV], ids=["model", "layer"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", selected(FAMILIES))
def test_forks_of_one_prompt(family, shape, policy):
    """As the same tokens with what was evicted masked; and the fork of another retention is none the wiser."""
    model = build(family)
    context, question = SHAPES[shape]
    first, then = turn(context, 0), turn(question, 7, seed=1)
    length = first.ids.shape[1] + then.ids.shape[1] + then.steps
    observe = dict(observe={"queries"}, observe_window=8)
    with lkv.Cache(model, Hold(), retention=1.0, chunks="last", **observe) as cache:
        start = talk(model, cache, [first], chunk=20)
        for retention in (0.15, 0.5):
            fork = cache.fork()
            for ours, theirs in zip(fork.ragged, cache.ragged, strict=True):
                assert ours.keys.data_ptr() == theirs.keys.data_ptr() and ours.keys is not None
            fork.evict(policy, retention=retention)
            layers = len(fork.ragged)
            totals = [2 * layers * max(1, round(retention * n)) for n in context]
            assert sum(layer.rows.lengths.sum(1) for layer in fork.ragged).tolist() == totals
            with recorded(fork, len(context), length) as recorder:
                seen = Turn(torch.cat([first.ids, then.ids], 1), torch.cat([first.mask, then.mask], 1), then.steps)
                outputs = answer(model, fork, first, then)
            assert sum(layer.rows.lengths.sum(1) for layer in fork.ragged).tolist() == [
                total + 2 * layers * (int(n) + then.steps) for total, n in zip(totals, then.mask.sum(1), strict=True)
            ]
            ids = torch.cat([seen.ids, outputs.argmax(-1)[:, then.ids.shape[1] - 1 : -1]], 1)
            mask = torch.cat([seen.mask, torch.ones(len(context), then.steps).long()], 1)
            expected = masked_logits(model, ids, mask, recorder.visible)[:, first.ids.shape[1] :]
            present = mask[:, first.ids.shape[1] :].bool()
            torch.testing.assert_close(outputs[present], expected[present], rtol=1e-4, atol=1e-4)
            fork.close()
        whole = [layer.rows for layer in cache.ragged]
        assert whole == [None] * len(whole) and cache.get_seq_length() == first.ids.shape[1]
        mask = torch.cat([first.mask, torch.ones(len(context), 1).long()], 1)
        with torch.no_grad():
            dense = call(model, tokens(len(context), 1), mask, cache)
    assert start.logits.shape[1] == first.ids.shape[1] and dense.isfinite().all()


def answer(model, cache, first: Turn, then: Turn) -> torch.Tensor:
    """Logits of a question in one call, and of greedy tokens behind it."""
    mask, logits = first.mask, []
    padded = bool((torch.cat([first.mask, then.mask], 1) == 0).any())
    with torch.no_grad():
        new, present = then.ids, then.mask
        for _ in range(then.steps + 1):
            mask = torch.cat([mask, present], 1)
            logits.append(call(model, new, mask if padded else None, cache))
            new, present = logits[-1][:, -1].argmax(-1, keepdim=True), torch.ones(len(mask), 1).long()
    return torch.cat(logits, 1)


def test_evicting_later_is_evicting_at_once(model):
    """The rows are those that a cache of the policy itself would have kept."""
    prompt = turn([40, 26], 0)
    for policy in (ADAKV, SnapKV(window=4), StreamingLLM(), Together()):
        direct = lkv.Cache(model, policy, retention=0.2)
        later = lkv.Cache(model, Hold(), retention=1.0, chunks="last", observe=["queries"], observe_window=9)
        for cache in (direct, later):
            talk(model, cache, [prompt])
        later.evict(policy, retention=0.2)
        assert rows(later) == rows(direct)
        assert later.retained_bytes == direct.retained_bytes < later.nbytes
        later.evict(policy, retention=0.1)
        assert sum(map(len, rows(later)[0] + rows(later)[1])) == 2 * 2 * (4 + 3)


def test_evict_with_the_settings_of_the_cache(model):
    with torch.no_grad(), lkv.Cache(model, "streaming_llm", budget=9) as cache:
        call(model, tokens(1, 30), None, cache)
        for _ in range(3):
            call(model, tokens(1, 1), None, cache)
        assert cache.evict() is None
        assert rows(cache) == [[[0, 1, 2, 3, 28, 29, 30, 31, 32]] * 2] * 2
        cache.evict(budget=5)
        assert rows(cache) == [[[0, 1, 2, 3, 32]] * 2] * 2
        assert cache.settings.budget == 9
        call(model, tokens(1, 1), None, cache)
        assert cache.ragged[0].rows.lengths.tolist() == [[6, 6]]
        with pytest.raises(ValueError, match="lkv.Cache.crop: expected a length of at least 33"):
            cache.crop(-2)


def test_forks_share_what_is_not_written_and_nothing_else(model):
    """Whole rows by reference, packed ones by copy; whatever one does, the others do not see."""
    prompt = tokens(2, 30)
    with torch.no_grad(), lkv.Cache(model, ADAKV, budget=9, chunks="last") as cache:
        call(model, prompt, None, cache)
        expected = call(model, tokens(2, 5), None, copy.deepcopy(cache))
        one, two = cache.fork(), cache.fork()
        assert one.settings is cache.settings
        one.reset()
        two.crop(-4)
        call(model, tokens(2, 3), None, two)
        assert torch.equal(call(model, tokens(2, 5), None, cache.fork()), expected)
        call(model, tokens(2, 1), None, cache)
        packed = cache.fork()
        assert packed.ragged[0].rows.k.data_ptr() != cache.ragged[0].rows.k.data_ptr()
        before = rows(cache)
        call(model, tokens(2, 1), None, packed)
        assert rows(cache) == before


def test_a_fork_of_sliding_layers_is_its_own():
    model = build("gemma3")
    with torch.no_grad(), lkv.Cache(model, SnapKV(window=4), retention=1.0, chunks="last") as cache:
        call(model, tokens(1, 30), None, cache)
        expected = call(model, tokens(1, 3), None, copy.deepcopy(cache))
        fork = cache.fork()
        call(model, tokens(1, 9), None, fork)
        fork.reset()
        assert fork.get_seq_length() == 0 and cache.get_seq_length() == 30
        assert torch.equal(call(model, tokens(1, 3), None, cache), expected)


@pytest.mark.parametrize("chunks", ["each", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scope_model_in_turns(model, shape, chunks):
    """All layers share a total, at a prompt and at every later turn, and what is left may differ between them."""
    turns = [turn(SHAPES[shape][0], 9), turn(SHAPES[shape][1], 5, seed=1)]
    length = sum(t.ids.shape[1] + t.steps for t in turns)
    with (
        lkv.Cache(model, Together(), retention=0.15, chunks=chunks) as cache,
        recorded(cache, len(turns[0].ids), length) as recorder,
    ):
        outputs = talk(model, cache, turns)
    expected = masked_logits(model, outputs.ids, outputs.mask, recorder.visible)
    present = outputs.mask.bool()
    torch.testing.assert_close(outputs.logits[present], expected[present], rtol=1e-4, atol=1e-4)
    behind = chunks == "last"  # the first token of the answer
    logical = turns[0].mask.sum(1) + turns[0].steps + turns[1].mask.sum(1) + behind
    per_layer = [layer.rows.lengths.sum(1) - 2 * (turns[1].steps - behind) for layer in cache.ragged]
    assert sum(per_layer).tolist() == [4 * max(1, round(0.15 * int(n))) for n in logical]
    assert not torch.equal(*per_layer)
    assert [layer.row_counts for layer in cache.ragged] == [
        layer.rows.lengths.sum(1).tolist() for layer in cache.ragged
    ]


def test_scope_model_chooses_as_the_competition_of_all_layers(model):
    prompt = tokens(1, 40)
    watched = lkv.Cache(model, SnapKV(window=4), retention=1.0, chunks="last")
    talk(model, watched, [Turn(prompt, torch.ones_like(prompt), 0)])
    scores = [
        SnapKV(window=4).score(layer.index, observe(layer, frozenset({"queries"}), 4)) for layer in watched.ragged
    ]
    budgets = lkv_ext.budgets_from_scores(scores, 4 * 10, across="layers", window=4)
    watched.evict(Together(), budget=10)
    assert torch.stack([layer.rows.lengths for layer in watched.ragged]).tolist() == budgets.tolist()


@pytest.mark.parametrize("policy", [Asks(window=4), AsksTogether(window=4)], ids=["layer", "model"])
@pytest.mark.parametrize("length", [[40], [40, 26]], ids=["one", "padded"])
def test_scores_are_told_the_rows_per_head(model, policy, length):
    told.clear()
    cache = lkv.Cache(model, policy, retention=0.3)
    talk(model, cache, [turn(length, 0)])
    assert told == 2 * [[round(0.3 * n) for n in length]]


@pytest.mark.parametrize("policy", [ADAKV, Together()], ids=["layer", "model"])
@pytest.mark.parametrize("packed", [False, True])
def test_scores_from_elsewhere(model, policy, packed):
    """With the scores of the policy given, the rows are the same, and nothing needs to be observed."""
    prompt = turn([40, 26], 0)
    seeing = lkv.Cache(model, Hold(), retention=1.0, chunks="last", observe={"queries"}, observe_window=4)
    blind = lkv.Cache(model, Hold(), retention=1.0, chunks="last")
    for cache in (seeing, blind):
        talk(model, cache, [prompt])
        if packed:
            cache.evict()
    scores = [policy.score(layer.index, observe(layer, policy.needs, 4)) for layer in seeing.ragged]
    with pytest.raises(ValueError, match="lkv.Cache.evict: expected scores of 2 layers, got those of 1"):
        blind.evict(policy, budget=9, scores=scores[:1])
    with pytest.raises(ValueError, match="lkv.Cache: expected scores of .* of shape"):
        blind.evict(policy, budget=9, scores=[s[..., 1:] for s in scores])
    seeing.evict(policy, budget=9)
    blind.evict(policy, budget=9, scores=scores)
    assert rows(blind) == rows(seeing)


def test_scope_model_capped(model):
    prompt = turn([30, 17], 60)
    cap, interval, most = 24, 8, 0
    with torch.no_grad(), lkv.Cache(model, Together(), cap=cap, interval=interval) as cache:
        talk(model, cache, [Turn(prompt.ids, prompt.mask, 0)])
        mask = prompt.mask
        for i in range(60):
            mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
            call(model, tokens(2, 1, seed=i), mask, cache)
            counts = sum(layer.rows.lengths.sum(1) for layer in cache.ragged)
            assert counts.tolist() == [
                sum(each) for each in zip(*(layer.row_counts for layer in cache.ragged), strict=True)
            ]
            most = max(most, int(counts.max()))
    assert most == 2 * 2 * cap


@pytest.mark.parametrize(
    "options, policy, message",
    [
        (dict(), "snapkv", "expected a policy that needs only what is observed, nothing, got one that needs queries"),
        (
            dict(observe={"queries"}),
            "snapkv",
            "a window of at most the observed 1 queries, got 32: make the cache with",
        ),
        (dict(), 7, "expected a name or a policy, got 7"),
    ],
)
def test_what_was_not_observed(model, options, policy, message):
    with torch.no_grad(), lkv.Cache(model, Hold(), retention=1.0, chunks="last", **options) as cache:
        call(model, tokens(1, 30), None, cache)
        with pytest.raises((ValueError, TypeError), match=message):
            cache.evict(policy, retention=0.2)
        assert cache.ragged[0].rows is None
        cache.evict("streaming_llm", retention=0.2)
        assert cache.ragged[0].rows.lengths.tolist() == [[6, 6]]


def test_evict_refuses(model):
    with pytest.raises(ValueError, match="lkv.Cache: expected observe of at most .*, got attention"):
        lkv.Cache(model, retention=0.5, observe={"attention"})
    with pytest.raises(ValueError, match="a window of at most the observed 8 queries, got 32"):
        lkv.Cache(model, retention=0.5, observe_window=8)
    with torch.no_grad(), lkv.Cache(model, retention=0.5) as cache:
        with pytest.raises(ValueError, match="lkv.Cache.evict: expected a cache with tokens, got an empty one"):
            cache.evict()
        call(model, tokens(1, 30), None, cache)
        with pytest.raises(ValueError, match="lkv.Cache: expected one of retention and budget, got both"):
            cache.evict(retention=0.2, budget=3)
        with pytest.raises(ValueError, match=r"lkv.Cache: expected retention in \(0, 1\], got 2"):
            cache.evict(retention=2)


def test_steps_are_the_same_where_gradients_are_enabled() -> None:
    """A model whose weights need none."""
    model, ids = copy.deepcopy(build("llama")).requires_grad_(False), tokens(1, 30)
    logits = []
    for enabled in (False, True):
        cache = lkv.Cache(model, "knorm", retention=0.5)
        with torch.set_grad_enabled(enabled):
            call(model, ids, None, cache)
            logits.append([call(model, ids[:, i : i + 1], None, cache) for i in range(3)])
    assert all(map(torch.equal, *logits))
