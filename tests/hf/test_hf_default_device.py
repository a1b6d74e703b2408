"""`lkv.Cache` with torch's default device on "meta", whose tensors have no values, and a model on the CPU.

All that transformers makes for a forward lies beside its inputs; a tensor of ours that does not fails.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build, call, tokens
from safetensors.torch import load_file
from snapshots import differences, snapshot
from test_compression import SHORT
from test_every_policy import POLICIES, for_heads, model
from torch import Tensor

import lkv
from lkv import memory, offline
from lkv.evaluate.decode import answer
from lkv.evaluate.kept import kept_rows
from lkv.policies import AdaKV, KeyDiff, KVzip, Policy, Random, SnapKV
from lkv.policies.lkv import checkpoint
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.policies.tables import DuoAttention, HeadKV

LENGTH = 50
IDS, THEN, BEAMS, PADDING = tokens(2, LENGTH), tokens(2, 6, 1), tokens(3, 2, 2), torch.tensor([[0], [9]])
MASK = (torch.arange(LENGTH + 40) >= PADDING).long()
HIDES = MASK.clone()
HIDES[0, 20:30] = 0
ONE_BY_ONE, TEXTS = tokens(2, 12, 2), [tokens(1, 40, n) for n in range(2)]
TABLE = [[0.2, 0.9], [1.0, 0.1], [0.5, 0.3]]
TABLES = {
    "headkv": HeadKV(SnapKV(window=4), TABLE),
    "duoattention": DuoAttention(TABLE, sink=1, recent=3),
}


def elsewhere(f: Callable[[], object]) -> object:
    with torch.device("meta"), torch.no_grad():
        return f()


def made(policy: object = "snapkv", **options: object) -> lkv.Cache:
    return lkv.Cache(model(2), policy, **({"retention": 0.4} | options))


def read(cache: lkv.Cache, ids: Tensor = IDS, mask: Tensor | None = MASK) -> Tensor:
    """Logits of the next tokens."""
    end = cache.get_seq_length() + ids.shape[1]
    return call(model(2), ids, None if mask is None else mask[: len(ids), :end], cache)


def talked(cache: lkv.Cache) -> tuple[lkv.Cache, Tensor]:
    """A padded prompt, tokens one by one, and a second prompt."""
    out = [read(cache)]
    out += [read(cache, THEN[:, n : n + 1]) for n in range(2)]
    return cache, torch.cat([*out, read(cache, THEN)], 1)


def check_same(f: Callable[[], object]) -> None:
    with torch.no_grad():
        expected = f()
    _check(elsewhere(f), expected)


def _check(got: object, expected: object) -> None:
    if isinstance(expected, lkv.Cache):
        assert differences(snapshot(got), snapshot(expected)) == []
    elif isinstance(expected, Tensor):
        assert got.device == expected.device and torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        _check(list(got.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        for one, other in zip(got, expected, strict=True):
            _check(one, other)
    else:
        assert got == expected


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A checkpoint of a kind of budget and scorer."""

    def saved(budget: str, input: str) -> Path:
        folder = tmp_path_factory.mktemp("lkv")
        torch.manual_seed(0)
        shape, design = Shape.of(model(2)), Design(budget, input=input, hidden=8, sink=1, window=3)
        policy = design.build(shape)
        if policy.budget.logits is not None:
            torch.nn.init.normal_(policy.budget.logits.mlp[2].weight)
        checkpoint.save(folder, policy, design, shape, {})
        return folder

    return saved


@pytest.mark.parametrize("name", [*POLICIES, *TABLES])
def test_policies(name: str) -> None:
    policy = TABLES[name] if name in TABLES else for_heads(POLICIES[name], 2)
    check_same(lambda: talked(made(policy)))


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("input", ["kv", "hidden"])
@pytest.mark.parametrize("budget", ["capped", "softmax", "threshold", "uniform"])
def test_checkpoints(budget: str, input: str, with_model: bool, learned: Callable[[str, str], Path]) -> None:
    folder = learned(budget, input)

    def run() -> object:
        policy = lkv.load(folder, model(2) if with_model else None)
        cache, logits = talked(made(policy))
        checkpoint.save(folder / "again", policy, Design(), Shape.of(model(2)), {})
        return logits, kept_rows(cache, 1), load_file(folder / "again" / checkpoint.WEIGHTS)

    check_same(run)


def beams() -> object:
    cache = made(AdaKV(SnapKV(window=4)))
    read(cache, IDS[:1])
    cache.batch_repeat_interleave(3)
    out = read(cache, BEAMS[:, :1], None)
    cache.reorder_cache(torch.tensor([2, 2, 0], device="cpu"))
    read(cache, BEAMS[:, 1:], None)
    cache.batch_select_indices(torch.tensor([1, 0], device="cpu"))
    return cache, out, read(cache, THEN[:, :1], None)


def cropped() -> object:
    cache = made()
    read(cache)
    read(cache, THEN[:, :1])
    read(cache, THEN[:, 1:2])
    cache.crop(-1)
    out = read(cache, THEN[:, 2:3])
    rows = kept_rows(cache, 1)
    cache.reset()
    return rows, out, talked(cache)


def capped() -> object:
    cache = made("h2o", cap=20, interval=4)
    read(cache)
    return [read(cache, one) for one in ONE_BY_ONE.split(1, 1)], cache


def hidden_later() -> object:
    cache = made(chunks="last", observe={"queries", "pre_rope_keys", "hidden_states"})
    read(cache)
    return read(cache, THEN, HIDES), cache


def first_hidden_later() -> object:
    """No token was hidden before."""
    cache = made(retention=1.0)
    read(cache, mask=None)
    return read(cache, THEN, HIDES[[0, 0]]), cache


def in_pieces() -> object:
    cache = made("adakv", chunks="last")
    with cache.prefill():
        for piece in IDS.split([19, 1, 30], 1):
            read(cache, piece)
    return read(cache, THEN[:, :1]), read(cache, THEN), cache


def evicted_now() -> object:
    needs = {"queries", "all_queries", "pre_rope_keys", "attention_cosine"}
    cache = made("streaming_llm", retention=1.0, chunks="last", observe=needs, observe_window=8)
    read(cache)
    whole = kept_rows(cache, 1)
    policies: list[Policy] = [AdaKV(SnapKV(window=4)), Random(), for_heads(POLICIES["squeeze"], 2), TABLES["headkv"]]
    forks = [cache.fork() for _ in policies]
    for fork, policy in zip(forks, policies, strict=True):
        fork.evict(policy, budget=12)
    scores = [layer.whole()[0].norm(dim=-1) for layer in cache.ragged]
    cache.evict(POLICIES["kvzap across layers"], retention=0.3, scores=scores)
    return whole, forks, cache


def compressed() -> object:
    options = dict(retention=0.4, attention_mask=MASK[:, :LENGTH])
    found = [lkv.compress(model(2), IDS, policy, **options) for policy in (SnapKV(window=4), KVzip(repetition=SHORT))]
    return found, [read(cache, THEN) for cache in found]


def generated() -> object:
    cache = lkv.Cache(build("llama"), AdaKV(SnapKV(window=4)), retention=0.4)
    options = dict(attention_mask=MASK[:, :LENGTH], past_key_values=cache, max_new_tokens=8, do_sample=False)
    return build("llama").generate(IDS, **options), cache


def answered() -> object:
    cache = made()
    read(cache)
    return answer(model(2), cache, MASK[:, :LENGTH], [[3, 4], [5]], 6, 0, [7])


def statistics_of_texts() -> object:
    curves = offline.budget_curves(build("llama"), TEXTS, KeyDiff())
    found = offline.query_statistics(build("llama"), TEXTS)
    return curves.lost, found.mean, found.covariance


STEPS = [beams, cropped, capped, hidden_later, first_hidden_later, in_pieces, evicted_now, compressed, generated]
STEPS += [answered, statistics_of_texts]


@pytest.mark.parametrize("steps", STEPS, ids=[steps.__name__ for steps in STEPS])
def test_steps(steps: Callable[[], object]) -> None:
    check_same(steps)


@pytest.mark.parametrize("retention", [0.4, 1.0])
def test_files(retention: float, tmp_path: Path) -> None:
    def run() -> object:
        cache, _ = talked(made(retention=retention))
        cache.save(tmp_path / "cache")
        again = lkv.Cache.load(tmp_path / "cache", model(2))
        pickled = pickle.loads(pickle.dumps(cache))
        pickled.attach(model(2))
        return again, read(again, THEN), read(pickled, THEN), read(cache, THEN)

    check_same(run)


def test_footprints() -> None:
    check_same(lambda: memory.footprint(build("gemma3").config))
