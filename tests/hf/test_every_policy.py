"""Every registered policy, with settings that fit a short text, through the same checks on tiny models."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import cache

import pytest
import torch
import transformers
from families import SMALL, call, tokens
from torch import Tensor
from transformers import PreTrainedModel

import lkv
from lkv import policies
from lkv.policies import (
    LUKV,
    AcrossLayers,
    AdaKV,
    CAKEScore,
    ExpectedAttention,
    FastKVzip,
    KVzap,
    Policy,
    Protect,
    PyramidKV,
    QueryStatistics,
    SnapKV,
    SqueezeAttention,
)
from lkv.policies.base import Scorer
from lkv.policies.fastkvzip import FastGate
from lkv.policies.kvzap import Gate
from lkv.policies.lukv import Curves

NAMES = [name for name in policies.POLICIES if "second_pass" not in policies.get(name).needs]


def gate() -> Gate:
    torch.manual_seed(3)
    shapes = ((16, 32), (16,)), ((4, 16), (4,))
    return Gate(tuple(tuple(tuple(torch.randn(shape) for shape in pair) for pair in shapes) for _ in range(3)))


def fast_gate(heads: int = 4) -> FastGate:
    """Two queries for each head, of 4 numbers, and 3 keys of no token."""
    torch.manual_seed(4)
    shapes = {"q_proj.weight": (32, 32), "q_proj.bias": (32,), "k_proj.weight": (16, 32), "k_base": (4, 1, 3, 4)}
    shapes |= {"q_norm.weight": (4,), "k_norm.weight": (4,), "b": (4, 1, 2)}
    layers = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)]
    return FastGate(
        tuple({n: x if "norm" in n else x[: heads * len(x) // 4] for n, x in layer.items()} for layer in layers)
    )


def curves() -> Curves:
    powers = torch.tensor([[0.5, 1, 2, 1], [2, 0.7, 1, 1], [1, 1.5, 0.6, 1]]).double()
    return Curves(torch.linspace(0.01, 0.99, 99).double()[:, None, None] ** powers)


def for_heads(policy: Policy, heads: int) -> Policy:
    """What is made for a model: the first of 4 KV heads."""
    if isinstance(policy, KVzap):
        maps = ((*first, tuple(part[:heads] for part in last)) for *first, last in policy.gate.layers)
        policy = replace(policy, gate=Gate(tuple(maps)))
    if isinstance(policy, FastKVzip):
        policy = replace(policy, gate=fast_gate(heads))
    if isinstance(policy, LUKV):
        policy = replace(policy, curves=Curves(policy.curves.lost[:, :, :heads]))
    inner = getattr(policy, "scorer", None)
    return policy if inner is None else replace(policy, scorer=for_heads(inner, heads))


GRID = {
    "pyramid of adakv": PyramidKV(AdaKV()),
    "squeezed adakv": SqueezeAttention(AdaKV()),
    "adakv of caote of h2o": AdaKV(policies.CAOTE(policies.H2O())),
    "adakv of criticalkv": AdaKV(policies.CriticalKV()),
    "across layers of caote": AcrossLayers(policies.CAOTE()),
    "cake of adakv": policies.CAKE(AdaKV(CAKEScore())),
    "kvzap across layers": AcrossLayers(KVzap(gate())),
    "fastkvzip across layers": AcrossLayers(FastKVzip(fast_gate())),
    "lukv": LUKV(SnapKV(), curves()),
    "statistics of other texts": ExpectedAttention(
        statistics=QueryStatistics(torch.ones(3, 4, 8), torch.eye(8).expand(3, 4, 8, 8))
    ),
    "lava of protection": policies.LAVa(AdaKV(policies.LAVaScore(Protect(policies.SnapKV(), sink=2)))),
}
FITTED = ("kvzap across layers", "fastkvzip across layers", "lukv", "statistics of other texts")  # made for a model
LENGTH = 50


def small(policy: Policy) -> Policy:
    """The same with windows, pieces and ends for a text of 50 tokens."""
    if not is_dataclass(policy):
        return policy
    found = {field.name: getattr(policy, field.name) for field in fields(policy)}
    less = {"window": 4, "sink": 2, "lag": 8}
    new = {name: min(value, less[name]) for name, value in found.items() if name in less}
    if "scorer" in found:
        new["scorer"] = small(found["scorer"])
    return replace(policy, **new)


POLICIES = {name: small(p) for name, p in ({n: policies.get(n) for n in NAMES} | GRID).items()}
every = pytest.mark.parametrize("name", POLICIES)


@cache
def model(group: int) -> PreTrainedModel:
    torch.manual_seed(group)
    options = dict(SMALL, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4 // group, head_dim=8)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    for layer in made.model.layers:  # so that attention is far from even
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=0.6)
    return made.eval()


@torch.no_grad()
def read(policy: Policy, ids: Tensor, mask: Tensor | None = None, group: int = 2, **options: object) -> lkv.Cache:
    cache = lkv.Cache(model(group), for_heads(policy, 4 // group), **({"retention": 0.4} | options))
    call(model(group), ids, mask, cache)
    return cache


def kept(cache: lkv.Cache, b: int = 0, shift: int = 0) -> list[list[int]]:
    """Positions of the rows of every head of every layer."""
    rows = []
    for layer in cache.ragged:
        padded = layer.rows.padded(layer.rows.positions)[b].tolist()
        counts = layer.rows.lengths[b].tolist()
        rows += [[place - shift for place in head[:count]] for head, count in zip(padded, counts, strict=True)]
    return rows


@pytest.mark.parametrize("group", [1, 2, 4])
@every
def test_the_budget_is_kept_exactly_and_the_ends_stay(name: str, group: int) -> None:
    """Rows that are there, over all layers; what is protected is among them, and later tokens are behind them."""
    policy = POLICIES[name]
    for retention in (0.2, 0.5):
        cache = read(policy, tokens(1, LENGTH), group=group, retention=retention)
        rows = kept(cache)
        assert sum(map(len, rows)) == round(retention * LENGTH) * len(rows)
        assert sum(map(len, rows)) == sum(layer.row_counts[0] for layer in cache.ragged)
        assert all(head == sorted(set(head)) for head in rows)
        ends = {*range(policy.sink), *range(LENGTH - policy.window, LENGTH)}
        assert all(ends <= set(head) for head in rows if len(head) >= len(ends))
        if policy.scope == "layer" and not isinstance(policy, (PyramidKV, LUKV)):
            per_layer = [sum(map(len, rows[n : n + 4 // group])) for n in range(0, len(rows), 4 // group)]
            assert len(set(per_layer)) == 1
        if isinstance(policy, Scorer):
            assert len(set(map(len, rows))) == 1
        with torch.no_grad():
            logits = call(model(group), tokens(1, 1, 1), None, cache)
        assert logits.isfinite().all() and [*rows[0], LENGTH] == kept(cache)[0]


@every
def test_a_batch_is_its_texts_one_by_one(name: str) -> None:
    """And padding in front is as none."""
    policy = POLICIES[name]
    ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    for b, padding in enumerate((0, 7, 21)):
        mask[b, :padding] = 0
    together = read(policy, ids, mask)
    for b, padding in enumerate((0, 7, 21)):
        alone = read(policy, ids[b : b + 1, padding:])
        if name == "random":  # drawn by place
            assert list(map(len, kept(together, b))) == list(map(len, kept(alone)))
        else:
            assert kept(together, b, padding) == kept(alone), b


@every
def test_no_state_is_left_by_another_text(name: str) -> None:
    policy, ids = POLICIES[name], tokens(1, LENGTH)
    fresh = kept(read(policy, ids))
    assert kept(read(policy, tokens(1, 2 * LENGTH, 5))) != fresh
    assert kept(read(policy, ids)) == fresh
    cache = read(policy, tokens(1, 2 * LENGTH, 5))
    cache.reset()
    with torch.no_grad():
        call(model(2), ids, None, cache)
    assert kept(cache) == fresh


@every
def test_pieces_of_a_prompt_are_the_prompt(name: str) -> None:
    """All of them are looked at where the eviction waits for the end."""
    policy, ids = POLICIES[name], tokens(1, LENGTH)
    cache = lkv.Cache(model(2), for_heads(policy, 2), retention=0.4, chunks="last")
    with cache.prefill(), torch.no_grad():
        for piece in ids.split([19, 1, 30], 1):
            call(model(2), piece, None, cache)
    assert kept(cache) == kept(read(policy, ids))


@every
def test_half_precision_and_files(name: str, tmp_path) -> None:
    """In bfloat16 the same numbers of rows, and no NaN; a cache that was saved before its eviction goes on."""
    policy, ids = POLICIES[name], tokens(1, LENGTH)
    half = model(2).to(torch.bfloat16)
    try:
        cache = read(policy, ids)
        assert sum(map(len, kept(cache))) == 20 * len(kept(cache))
        assert cache.ragged[0].rows.k.dtype == torch.bfloat16
    finally:
        half.float()
    cache = lkv.Cache(model(2), for_heads(policy, 2), retention=0.4, chunks="last")
    with torch.no_grad():
        call(model(2), ids, None, cache)
        cache.save(tmp_path / "cache")
        fitted = for_heads(policy, 2) if name in FITTED else None  # which files do not hold
        other = lkv.Cache.load(tmp_path / "cache", model(2), policy=fitted)
        expected = read(policy, ids)
        for each in (cache, cache.fork(), other):
            if each is other and policy.needs & {"output_projection", "rotary"}:
                with pytest.raises(ValueError, match="expected a token since the cache was made or loaded, as the pol"):
                    each.evict()  # the file has no weights: the next token brings them
                continue
            each.evict()
            assert kept(each) == kept(expected)


@every
def test_a_cap_while_decoding(name: str) -> None:
    """The policy is called again for rows of heads that differ: never more rows than the cap."""
    policy = POLICIES[name]
    with torch.no_grad():
        cache = lkv.Cache(model(2), for_heads(policy, 2), retention=0.5, cap=27, interval=3)
        call(model(2), tokens(2, LENGTH), None, cache)
        for n in range(7):
            assert call(model(2), tokens(2, 1, n), None, cache).isfinite().all()
            rows = [sum(layer.row_counts[b] for layer in cache.ragged) for b in range(2)]
            assert max(rows) <= 27 * 6
