"""Long answers under a cap: rows and logits are those of a reference that keeps all, masks and sums up at each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import SMALL, call, tokens
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

import lkv
from lkv.policies import CAOTE, H2O, RKV, TOVA, FastCAOTE, Policy, SnapKV, StreamingLLM
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import Design, Shape

LAYERS, HEADS, GROUP, PROMPT, STEPS = 3, 2, 2, 30, 32


@cache
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    options = dict(SMALL, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=8)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    for layer in made.model.layers:  # so that attention is far from even
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.6)
    return made.eval()


class Layer:
    """All that a layer has ever had: keys, values, which rows are alive, what each was paid, and by the last queries.

    `before`: keys before RoPE. All `[B, H, L, ...]`; `paid` is of each query head, `last` of the last 8 queries.
    """

    def __init__(self) -> None:
        self.alive = self.paid = self.keys = self.values = self.before = None
        self.last: list[tuple[Tensor, Tensor]] = []  # queries [B, Hq, D] and weights [B, Hq, L]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        batch, heads, count = query.shape[:3]
        length = keys.shape[2]
        new = torch.ones(batch, HEADS, count, dtype=torch.bool)
        self.alive = new if self.alive is None else torch.cat([self.alive, new], 2)
        old = torch.zeros(batch, heads, 0) if self.paid is None else self.paid
        self.keys, self.values = keys, values
        order = torch.arange(length)
        seen = self.alive.repeat_interleave(GROUP, 1)[:, :, None] & (order <= order[-count:, None])
        logits = query @ keys.repeat_interleave(GROUP, 1).transpose(2, 3) * scaling
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        self.paid = F.pad(old, (0, length - old.shape[2])) + weights.sum(2)
        self.last = [*self.last, *((query[:, :, i], weights[:, :, i]) for i in range(count))][-8:]
        return weights @ values.repeat_interleave(GROUP, 1)


class Reference:
    """Generates with every row in memory. `rule(layers)`: scores `[B, H, L]` of each layer; the best stay.

    `ends`: first and last rows that stay; `recent`: the share of a budget that the last rows are; `joint`: all heads
    of all layers share one total.
    """

    def __init__(self, rule: Callable[[list[Layer]], list[Tensor]], cap: int, interval: int, **options: object) -> None:
        self.rule, self.cap, self.interval = rule, cap, interval
        self.recent, self.joint = options.get("recent", 0.0), options.get("joint", False)
        self.ends = options.get("ends", (0, 0))
        self.layers, self.rows = [Layer() for _ in range(LAYERS)], DynamicCache()

    def step(self, ids: Tensor) -> Tensor:
        if self.rows.get_seq_length():
            fullest = max(sum(int(layer.alive[b].sum()) for layer in self.layers) for b in range(len(ids)))
            if fullest + HEADS * LAYERS > self.cap * HEADS * LAYERS:
                self.evict(self.cap - self.interval)

        def attention(module, query, key, value, mask, scaling=None, **kwargs):
            return self.layers[module.layer_idx].attend(query, key, value, scaling).transpose(1, 2), None

        hooks = [
            layer.self_attn.k_proj.register_forward_hook(lambda module, args, out, n=n: self.note(n, out))
            for n, layer in enumerate(model().model.layers)
        ]
        AttentionInterface.register("slow_reference", attention)
        own, model().config._attn_implementation = model().config._attn_implementation, "slow_reference"
        try:
            return call(model(), ids, None, self.rows)
        finally:
            model().config._attn_implementation = own
            for hook in hooks:
                hook.remove()

    def note(self, n: int, keys: Tensor) -> None:
        keys, layer = keys.unflatten(-1, (HEADS, -1)).transpose(1, 2), self.layers[n]
        layer.before = keys if layer.before is None else torch.cat([layer.before, keys], 2)

    def evict(self, rows: int) -> None:
        scores = self.rule(self.layers)
        for b in range(len(scores[0])):
            heads = [(n, h) for n in range(LAYERS) for h in range(HEADS)]
            budgets = self.budgets(scores, b, rows) if self.joint else dict.fromkeys(heads, rows)
            for n, h in heads:
                alive = self.layers[n].alive[b, h].nonzero().flatten().tolist()
                sure = self.sure(alive, budgets[n, h])
                best = sorted((i for i in alive if i not in sure), key=lambda i: (-float(scores[n][b, h, i]), i))
                kept = [*sure, *best[: budgets[n, h] - len(sure)]]
                self.layers[n].alive[b, h] = False
                self.layers[n].alive[b, h, kept] = True

    def sure(self, alive: list[int], budget: int) -> list[int]:
        last = max(int(budget * self.recent), self.ends[1])
        return sorted({*alive[: self.ends[0]], *alive[len(alive) - last :]})

    def budgets(self, scores: list[Tensor], b: int, rows: int) -> dict[tuple[int, int], int]:
        """The best of all rows but the protected ones."""
        count, entries = {}, []
        for n in range(LAYERS):
            for h in range(HEADS):
                alive = self.layers[n].alive[b, h].nonzero().flatten().tolist()
                sure = self.sure(alive, rows)
                count[n, h] = len(sure)
                entries += [(-float(scores[n][b, h, i]), n, h, i) for i in alive if i not in sure]
        for _, n, h, _ in sorted(entries)[: rows * LAYERS * HEADS - sum(count.values())]:
            count[n, h] += 1
        return count

    def kept(self, n: int) -> list[list[list[int]]]:
        return [[head.nonzero().flatten().tolist() for head in heads] for heads in self.layers[n].alive]


def group(weights: Tensor) -> Tensor:
    return weights.unflatten(1, (HEADS, GROUP)).mean(2)


def latest(layer: Layer) -> Tensor:
    return layer.last[-1][1]


def late(layers: list[Layer]) -> list[Tensor]:
    return [torch.arange(layer.alive.shape[2]).float().expand(layer.alive.shape) for layer in layers]


def sums(layers: list[Layer]) -> list[Tensor]:
    return [group(layer.paid) for layer in layers]


def by_the_last(layers: list[Layer]) -> list[Tensor]:
    """The mean of all heads: they hold the same tokens."""
    return [latest(layer).mean(1, keepdim=True).expand(layer.alive.shape) for layer in layers]


def changes(scores: Callable[[list[Layer]], list[Tensor]], fast: bool = False) -> Callable[[list[Layer]], list[Tensor]]:
    def rule(layers: list[Layer]) -> list[Tensor]:
        found = []
        for layer, score in zip(layers, scores(layers), strict=True):
            weights = score * layer.alive
            weights = (weights / weights.sum(-1, keepdim=True))[..., None]
            alive = layer.alive[..., None]
            mean = (layer.values * alive).sum(2) / alive.sum(2) if fast else (weights * layer.values).sum(2)
            found.append((weights / (1 - weights))[..., 0] * (layer.values - mean[:, :, None]).norm(dim=-1))
        return found

    return rule


def redundant(layers: list[Layer]) -> list[Tensor]:
    """One row after the other."""
    found = []
    for layer in layers:
        scores = torch.zeros(layer.alive.shape)
        for b, h in [(b, h) for b in range(scores.shape[0]) for h in range(HEADS)]:
            alive = layer.alive[b, h].nonzero().flatten().tolist()
            keys = F.normalize(layer.keys[b, h, alive], dim=-1)
            before, attention = len(alive) - 8, torch.zeros(len(alive) - 8)
            for query, _ in layer.last:
                logits = query[b].unflatten(0, (HEADS, GROUP))[h] @ layer.keys[b, h, alive[:before]].T
                attention += (logits * 8**-0.5).amax(0).softmax(0) / 8
            cosines = keys @ keys.T
            for i in range(len(alive)):
                cosines[i, i] = 0
                similar = [j for j in range(len(alive)) if cosines[i, j] > 0.5]
                cosines[i, similar[-1] if similar else 0] = 0
            redundancy = cosines.mean(0).softmax(0)
            for j in range(before):
                largest = max(float(attention[i]) for i in range(max(0, j - 3), min(before, j + 4)))
                scores[b, h, alive[j]] = 0.07 * largest - 0.93 * float(redundancy[j])
        found.append(scores)
    return found


@cache
def learned() -> Learned:
    shape = Shape.of(model())
    torch.manual_seed(3)
    made = Design(hidden=8, budget="threshold").build(shape)
    with torch.no_grad():
        made.budget.logits.mlp[2].weight.normal_(0, 1.0)
    return made


def of_the_whole_text(layers: list[Layer]) -> list[Tensor]:
    """LKV-T standardised over all tokens, and the bias of every head."""
    policy, found = learned(), []
    for n, layer in enumerate(layers):
        raw = policy.token_scorer.raw(n, torch.cat([layer.before, layer.values], -1))
        deviation = (raw.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        found.append((raw - raw.mean(-1, keepdim=True)) / deviation + policy.budget.bias()[n][:, None])
    return found


METHODS: dict[str, tuple[Policy, Callable[[list[Layer]], list[Tensor]], dict[str, object]]] = {
    "streaming_llm": (StreamingLLM(), late, {"ends": (4, 0)}),
    "h2o": (H2O(), sums, {"recent": 0.5}),
    "tova": (TOVA(), by_the_last, {"ends": (0, 1)}),
    "caote of h2o": (CAOTE(H2O()), changes(sums), {"recent": 0.5}),
    "fast caote of tova": (FastCAOTE(TOVA(window=0)), changes(by_the_last, fast=True), {}),
    "rkv": (RKV(), redundant, {"ends": (0, 8)}),
    "lkv threshold": (learned(), of_the_whole_text, {"joint": True, "ends": (4, 8)}),
}


def different_tokens() -> Tensor:
    """Each once: the scores of LKV-T in the first layer depend on the token alone, and equal ones go by rounding."""
    return torch.stack([2 + torch.randperm(62, generator=torch.Generator().manual_seed(b)) for b in range(2)])


def kept(cache: lkv.Cache, n: int) -> list[list[list[int]]]:
    rows = cache.ragged[n].rows
    padded, counts = rows.padded(rows.positions).tolist(), rows.lengths.tolist()
    return [[head[:m] for head, m in zip(*each, strict=True)] for each in zip(padded, counts, strict=True)]


@pytest.mark.parametrize(
    "name, interval", [(name, 5 if name == "rkv" else 1) for name in METHODS] + [("h2o", 5), ("lkv threshold", 5)]
)
@torch.no_grad()
def test_a_long_answer_is_that_of_a_reference_that_masks(name: str, interval: int) -> None:
    policy, rule, options = METHODS[name]
    cap, ids = 24, different_tokens()
    reference = Reference(rule, cap, interval, **options)
    cache = lkv.Cache(model(), policy, budget=cap - 2, cap=cap, interval=interval)
    call(model(), ids[:, :PROMPT], None, cache)
    reference.step(ids[:, :PROMPT])
    reference.evict(cap - 2)
    for n in range(PROMPT, PROMPT + STEPS):
        expected, got = (run(ids[:, n : n + 1]) for run in (reference.step, lambda x: call(model(), x, None, cache)))
        for layer in range(LAYERS):
            assert kept(cache, layer) == reference.kept(layer), (n, layer)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["h2o", "lkv threshold"])
@torch.no_grad()
def test_what_is_carried_goes_where_the_rows_go(name: str, tmp_path) -> None:
    """Through tokens that are cropped, copies, files, other orders of the batch and evictions by another policy."""
    policy, options = METHODS[name][0], dict(cap=30, interval=3)
    prompt, answer = tokens(2, PROMPT, 1), tokens(2, 30, 2)

    def start() -> lkv.Cache:
        made = lkv.Cache(model(), policy, budget=25, observe={"queries"}, observe_window=4, **options)
        call(model(), prompt, None, made)
        return made

    def feed(cache: lkv.Cache, ids: Tensor) -> list[Tensor]:
        return [call(model(), ids[:, n : n + 1], None, cache) for n in range(ids.shape[1])]

    plain = start()
    feed(plain, answer[:, :16])
    caches = {"copied": plain.fork(), "loaded": None, "cropped": start(), "ordered": start()}
    plain.save(tmp_path / "cache")
    caches["loaded"] = lkv.Cache.load(tmp_path / "cache", model(), policy=policy)
    feed(caches["cropped"], torch.cat([answer[:, :15], tokens(2, 1, 9)], 1))
    caches["cropped"].crop(-1)
    feed(caches["cropped"], answer[:, 15:16])
    caches["ordered"].batch_select_indices(torch.tensor([1, 0]))
    feed(caches["ordered"], answer.flip(0)[:, :16])
    caches["ordered"].batch_select_indices(torch.tensor([1, 0]))
    expected = feed(plain, answer[:, 16:])
    for way, other in caches.items():
        got = feed(other, answer[:, 16:])
        for layer in range(LAYERS):
            assert kept(other, layer) == kept(plain, layer), way
        torch.testing.assert_close(got, expected)

    # What another policy evicts by does not change what rows are worth to this one.
    mixed, same = start(), start()
    mixed.evict(SnapKV(window=4), retention=1.0)
    feed(mixed, answer[:, :5])
    feed(same, answer[:, :5])
    mixed.evict(SnapKV(window=4), budget=8)
    for layer, before in zip(mixed.ragged, same.ragged, strict=True):
        if name == "h2o":
            rows = layer.rows.padded(layer.rows.companions[0])[..., 0]
            assert (rows[0, 0, :7] > 0).all()  # the last one has seen itself alone
            assert before.observations.all_queries.read().queries.shape[2] > 0
        else:
            assert torch.equal(layer.carried_heads[..., 0], torch.full((2, HEADS), PROMPT + 5.0).double())


@torch.no_grad()
def test_sums_are_of_all_queries_so_far() -> None:
    """Two evictions with nothing between them keep what one would; a turn adds to what earlier ones have paid."""
    ids = tokens(1, PROMPT, 3)
    once, twice = (lkv.Cache(model(), H2O(), budget=rows) for rows in (10, 30))
    call(model(), ids, None, once)
    call(model(), ids, None, twice)
    twice.evict(budget=10)
    assert [kept(once, n) for n in range(LAYERS)] == [kept(twice, n) for n in range(LAYERS)]
    capped = lkv.Cache(model(), H2O(recent=0.0, average=True), budget=20, cap=30, interval=4)
    call(model(), ids, None, capped)
    for n in range(14):
        call(model(), tokens(1, 1, n), None, capped)
    rows = capped.ragged[0].rows
    seen = rows.padded(rows.companions[0])[0, 0, : int(rows.lengths[0, 0]), 1]
    evicted = capped.ragged[0].evicted
    places = rows.padded(rows.positions)[0, 0, : len(seen)]
    assert seen.tolist() == [max(evicted - int(place), 0) for place in places]
