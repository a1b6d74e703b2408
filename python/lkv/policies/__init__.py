"""Policies: what to keep. One file per method, all on the protocol of `lkv.policies.protocol`.

policy = lkv.policies.get("adakv")        # or AdaKV(SnapKV(window=64), alpha=0.1)
"""

from __future__ import annotations

from lkv.policies.across import AcrossLayers
from lkv.policies.adakv import AdaKV
from lkv.policies.base import Protect, Scorer
from lkv.policies.cake import CAKE, CAKEScore
from lkv.policies.caote import CAOTE, FastCAOTE
from lkv.policies.compactor import Compactor, Leverage
from lkv.policies.criticalkv import CriticalKV
from lkv.policies.defensivekv import DefensiveScore
from lkv.policies.expected_attention import ExpectedAttention, QueryStatistics
from lkv.policies.fastkvzip import FastKVzip
from lkv.policies.h2o import H2O
from lkv.policies.keys import KeyDiff, KNorm
from lkv.policies.kvzap import KVzap
from lkv.policies.kvzip import KVzip, Repetition
from lkv.policies.lagkv import LagKV
from lkv.policies.lava import LAVa, LAVaScore
from lkv.policies.lukv import LUKV
from lkv.policies.protocol import (
    NEEDS,
    SCOPES,
    Accumulates,
    Ahead,
    Carried,
    Layered,
    Observation,
    Policy,
    Refines,
    Weighs,
)
from lkv.policies.pyramidkv import PyramidKV
from lkv.policies.random import Random
from lkv.policies.registry import POLICIES, get, names
from lkv.policies.rkv import RKV
from lkv.policies.sagekv import SAGEKV
from lkv.policies.snapkv import SnapKV
from lkv.policies.squeeze import SqueezeAttention
from lkv.policies.streaming_llm import StreamingLLM
from lkv.policies.tables import DuoAttention, HeadKV
from lkv.policies.tova import TOVA

__all__ = [
    "CAKE",
    "CAOTE",
    "H2O",
    "LUKV",
    "NEEDS",
    "POLICIES",
    "RKV",
    "SAGEKV",
    "SCOPES",
    "TOVA",
    "Accumulates",
    "AcrossLayers",
    "AdaKV",
    "Ahead",
    "CAKEScore",
    "Carried",
    "Compactor",
    "CriticalKV",
    "DefensiveScore",
    "DuoAttention",
    "ExpectedAttention",
    "FastCAOTE",
    "FastKVzip",
    "HeadKV",
    "KNorm",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "LAVa",
    "LAVaScore",
    "LagKV",
    "Layered",
    "Leverage",
    "Observation",
    "Policy",
    "Protect",
    "PyramidKV",
    "QueryStatistics",
    "Random",
    "Refines",
    "Repetition",
    "Scorer",
    "SnapKV",
    "SqueezeAttention",
    "StreamingLLM",
    "Weighs",
    "get",
    "names",
]
