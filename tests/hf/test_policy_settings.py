"""Every setting of every policy changes which rows are kept: none is forgotten on its way to a score or a budget."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from functools import cache

import pytest
import torch
from families import tokens
from test_every_policy import curves, fast_gate, for_heads, gate, kept, model
from transformers import PreTrainedModel

import lkv
from lkv import policies
from lkv.policies import (
    CAKE,
    CAOTE,
    H2O,
    LUKV,
    RKV,
    SAGEKV,
    TOVA,
    AcrossLayers,
    AdaKV,
    CAKEScore,
    Compactor,
    CriticalKV,
    DefensiveScore,
    DuoAttention,
    ExpectedAttention,
    FastKVzip,
    HeadKV,
    KeyDiff,
    KNorm,
    KVzap,
    KVzip,
    LagKV,
    LAVa,
    LAVaScore,
    Leverage,
    Policy,
    Protect,
    PyramidKV,
    QueryStatistics,
    Random,
    Repetition,
    SnapKV,
    SqueezeAttention,
    StreamingLLM,
)
from lkv.policies.fastkvzip import FastGate
from lkv.policies.kvzap import Gate
from lkv.policies.lukv import Curves

LENGTH, RETENTIONS = 60, (0.2, 0.5)
TABLE, OTHER_TABLE = ((0.9, 0.1), (0.5, 0.3), (0.2, 0.6)), ((0.1, 0.9), (0.5, 0.3), (0.2, 0.6))
SNAP = SnapKV(window=4, sink=1)
STATISTICS = QueryStatistics(torch.linspace(-1, 1, 96).view(3, 4, 8), torch.eye(8).expand(3, 4, 8, 8))
GATE = for_heads(KVzap(gate()), 2).gate
OTHER_GATE = Gate(GATE.layers[::-1])
FAST_GATE = fast_gate(2)
ENDS = dict(sink=3, window=6)
# A policy with settings that fit a short text, and for every setting another value.
SETTINGS: dict[str, tuple[Policy, dict[str, object]]] = {
    "Random": (Random(window=4), dict(seed=1, **ENDS)),
    "StreamingLLM": (StreamingLLM(sink=2), dict(sink=3)),
    "SnapKV": (SNAP, dict(kernel_size=1, pooling="max", group="max", **ENDS)),
    "SnapKV of a maximum": (replace(SNAP, pooling="max"), dict(group_first=True)),
    "AdaKV": (AdaKV(SNAP), dict(scorer=TOVA(), alpha=0.9)),
    "AdaKV of a large part": (AdaKV(SNAP, alpha=0.6), dict(floor="minimum")),
    "AcrossLayers": (AcrossLayers(SNAP), dict(scorer=TOVA())),
    "RKV": (RKV(window=4, mix=0.9), dict(kernel_size=1, mix=0.1, threshold=-1.0, **ENDS)),
    "KVzap": (KVzap(GATE, window=2), dict(gate=OTHER_GATE, **ENDS)),
    "FastKVzip": (
        FastKVzip(FAST_GATE, window=2), dict(gate=FastGate(FAST_GATE.layers[::-1]), **ENDS)
    ),
    "LUKV": (for_heads(LUKV(SNAP, curves()), 2), dict(scorer=TOVA(), curves=Curves(curves().lost[:, :, 2:]))),
    "KVzip": (KVzip(sink=2), dict(sink=6, across="heads", repetition=Repetition(chunk=16))),
    "LAVa": (LAVa(AdaKV(LAVaScore(replace(SNAP, sink=0)), alpha=0.2)), dict(scorer=AdaKV(SNAP), code=True)),
    "LAVaScore": (AdaKV(LAVaScore(SNAP)), {}),  # a number for each head
    "CAOTE": (CAOTE(SNAP), dict(scorer=TOVA(), fast=True)),
    "SqueezeAttention": (SqueezeAttention(SNAP), dict(scorer=TOVA(), p=0.7)),
    "H2O": (H2O(recent=0.1), dict(recent=0.3, average=True, sink=3, window=12)),
    "CriticalKV": (CriticalKV(SNAP), dict(scorer=TOVA(), epsilon=1.0, first=0.1)),
    "SAGEKV": (SAGEKV(), dict(group="max", ends=0.1)),
    "TOVA": (TOVA(), ENDS),
    "PyramidKV": (PyramidKV(SNAP), dict(scorer=TOVA(), beta=2)),
    "CAKE": (CAKE(CAKEScore(window=4)), dict(scorer=SNAP, tau1=0.2, tau2=4.0)),
    "CAKEScore": (CAKEScore(window=4), dict(gamma=0.0, kernel_size=1, **ENDS)),
    "DefensiveScore": (DefensiveScore(window=4), dict(kernel_size=1, **ENDS)),
    "ExpectedAttention": (
        ExpectedAttention(sink=1), dict(future=8, sink=3, covariance=False, norms=False, epsilon=1.0,
                                        statistics=STATISTICS),
    ),
    "Leverage": (Leverage(sink=1, window=2), dict(ridge=100.0, **ENDS)),
    "Compactor": (Compactor(sink=1, window=2), dict(ridge=100.0, blending=9.0, piece=16, **ENDS)),
    "KNorm": (KNorm(), ENDS),
    "KeyDiff": (KeyDiff(), ENDS),
    "LagKV": (LagKV(sink=1, lag=8), dict(sink=3, lag=12, cross=True)),
    "Protect": (Protect(SNAP), dict(scorer=TOVA(), **ENDS)),
    "HeadKV": (HeadKV(SNAP, TABLE), dict(scorer=TOVA(), table=OTHER_TABLE, beta=4.0, temperature=3.0)),
    "DuoAttention": (DuoAttention(TABLE, sink=2, recent=4), dict(table=OTHER_TABLE, sink=3, recent=6)),
}  # fmt: skip
CASES = [(name, setting) for name, (_, others) in SETTINGS.items() for setting in others]
# Others change scores of single rows by what no row of such a text is near to; the cases of the method have them.
ELSEWHERE = {"DefensiveScore": {"sure"}, "LAVaScore": {"scorer", "before"}, "PyramidKV": {"whole"}}


@cache
def uneven() -> PreTrainedModel:
    """Its values are of very different length, as they are in models of the world."""
    made = copy.deepcopy(model(2))
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.v_proj.weight[::8] *= 20  # the first number of every head
    return made


@cache
def rows(policy: Policy) -> list[list[list[int]]]:
    return [kept(lkv.compress(uneven(), tokens(1, LENGTH), policy, retention=x)) for x in RETENTIONS]


@pytest.mark.parametrize(("name", "setting"), CASES, ids=[f"{name}-{setting}" for name, setting in CASES])
def test_a_setting_changes_what_is_kept(name: str, setting: str) -> None:
    policy, others = SETTINGS[name]
    assert others[setting] != getattr(policy, setting)
    assert rows(replace(policy, **{setting: others[setting]})) != rows(policy)


def test_no_setting_is_left_out() -> None:
    known: dict[str, set[str]] = {}
    for name, (_, others) in SETTINGS.items():
        kind = name.split(" of ")[0]
        known[kind] = known.get(kind, ELSEWHERE.get(kind, set())) | set(others)
    every = [getattr(policies, name) for name in policies.__all__]
    kinds = [x for x in every if isinstance(x, type) and is_dataclass(x) and hasattr(x, "score")]
    assert len(kinds) > 20
    for kind in kinds:
        if kind.__name__ != "FastCAOTE":  # CAOTE with one of its settings
            assert {x.name for x in fields(kind)} == known[kind.__name__], kind.__name__
