"""The methods of this package: what each is, where it is from, what it asks of a cache. `lkv policies` prints them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lkv.policies.adakv import AdaKV
from lkv.policies.cake import CAKE
from lkv.policies.caote import CAOTE, FastCAOTE
from lkv.policies.compactor import Compactor
from lkv.policies.criticalkv import CriticalKV
from lkv.policies.defensivekv import defensive_kv, layer_defensive_kv
from lkv.policies.expected_attention import ExpectedAttention
from lkv.policies.h2o import H2O
from lkv.policies.keys import KeyDiff, KNorm
from lkv.policies.kvzip import KVzip
from lkv.policies.lagkv import LagKV
from lkv.policies.lava import LAVa, lava_code
from lkv.policies.protocol import Policy
from lkv.policies.pyramidkv import PyramidKV
from lkv.policies.random import Random
from lkv.policies.rkv import RKV
from lkv.policies.sagekv import SAGEKV
from lkv.policies.snapkv import SnapKV
from lkv.policies.squeeze import SqueezeAttention
from lkv.policies.streaming_llm import StreamingLLM
from lkv.policies.tova import TOVA

CODE, PAPER = "authors' code", "paper"  # what a policy was written after; of the latter there is no code


@dataclass(frozen=True)
class Entry:
    """A method.

    Attributes:
        make: the policy with its defaults.
        score: what a row is worth. budgets: how many every head keeps.
        cost: of scoring a prompt of L tokens, per layer, beside reading its rows; w is the window.
        paper: its number in the arXiv, or where it appeared. source: what it was written after.
    """

    make: Callable[[], Policy]
    score: str
    budgets: str
    cost: str
    paper: str
    source: str

    @property
    def needs(self) -> str:
        return ", ".join(sorted(need.replace("_", " ") for need in self.make().needs)) or "nothing"

    @property
    def when(self) -> str:
        policy = self.make()
        if "second_pass" in policy.needs:
            return "after a second pass"
        return {"layer": "after each layer", "model": "after all layers", "cascade": "after each layer again"}[
            policy.scope
        ]


def _row(make: Callable[[], Policy], score: str, budgets: str, cost: str, paper: str, source: str = CODE) -> Entry:
    return Entry(make, score, budgets, cost, paper, source)


WHEN = {"layer": "after each layer", "model": "after all layers", "cascade": "after each layer, earlier ones again"}
EQUAL, COMPETE, WINDOW = "equal", "heads of a layer compete", "attention of w queries"
CATALOG: dict[str, Entry] = {
    "random": _row(Random, "a hash of layer, head and position", EQUAL, "none", "", "a floor"),
    "streaming_llm": _row(StreamingLLM, "the first 4 tokens, then the last", EQUAL, "none", "2309.17453"),
    "snapkv": _row(SnapKV, "attention of the last 32 queries, average of 5 tokens", EQUAL, WINDOW, "2404.14469"),
    "adakv": _row(
        AdaKV, "attention of the last 32 queries, maximum of 7 tokens", f"{COMPETE}, 0.2 of the mean is sure", WINDOW,
        "2407.11550",
    ),
    "kvzip": _row(
        KVzip, "largest attention while the text is repeated", "heads of all layers compete", "a second prefill",
        "2505.23416",
    ),
    "lava": _row(
        LAVa, "attention of the last 32 queries, maximum of 7 tokens, times the largest value of the head",
        f"layers by the entropy of their scores, then {COMPETE}", WINDOW, "2509.09754", PAPER,
    ),
    "lava_code": _row(
        lava_code, "as lava, values of the window left out", "as lava, 0.2 of the mean is sure", WINDOW, "2509.09754"
    ),
    "caote": _row(
        CAOTE, "what the output changes by without the row, by SnapKV's attention", EQUAL,
        f"{WINDOW}, values once", "2504.14051", PAPER,
    ),
    "fast_caote": _row(
        FastCAOTE, "as caote, with the mean value for the output", EQUAL, f"{WINDOW}, values once", "2504.14051", PAPER
    ),
    "squeeze": _row(
        SqueezeAttention, "those of another policy, by default StreamingLLM",
        "layers whose attention changes least keep 0.38 of the mean", "hidden states once", "2404.04793",
    ),
    "h2o": _row(
        H2O, "attention of all queries, summed; the last half", EQUAL, "attention of L queries", "2306.14048"
    ),
    "criticalkv": _row(
        CriticalKV, "attention of the last 32 queries; half of a budget times the norm of the projected value", EQUAL,
        f"{WINDOW}, projection of values", "2502.03805", "kvpress",
    ),
    "sagekv": _row(
        SAGEKV, "attention of the last query, best rows of each query head; first and last quarter", EQUAL,
        "attention of 1 query", "2503.08879", PAPER,
    ),
    "tova": _row(TOVA, "attention of the last query, mean of all heads", EQUAL, "attention of 1 query", "2401.06104"),
    "rkv": _row(
        RKV, "0.07 of the attention of the last 8 queries, minus 0.93 of the likeness to other keys", EQUAL,
        "attention of w queries, keys times keys", "2505.24133",
    ),
    "pyramidkv": _row(
        PyramidKV, "attention of the last 8 queries, maximum of 7 tokens", "layers in equal steps, the first keep most",
        WINDOW, "2406.02069",
    ),
    "cake": _row(
        CAKE, "mean and 200 times the variance of the attention of the last 32 queries",
        "layers by the spread and the change of their attention", f"{WINDOW}, twice", "ICLR 2025",
    ),
    "defensivekv": _row(
        defensive_kv, "largest attention of any of the last 32 queries, times the norm of the projected value", COMPETE,
        f"{WINDOW}, projection of values", "ICLR 2026",
    ),
    "layer_defensivekv": _row(
        layer_defensive_kv, "as defensivekv", "heads of all layers compete", f"{WINDOW}, projection of values",
        "ICLR 2026",
    ),
    "expected_attention": _row(
        ExpectedAttention, "attention that queries of the text's mean and covariance would pay later", EQUAL,
        "covariance of queries, keys once", "2510.00636", "kvpress",
    ),
    "compactor": _row(
        Compactor, "leverage of the key before RoPE, and attention within 256 tokens", EQUAL,
        "keys squared, attention of 256 by 256", "2507.08143", "kvpress",
    ),
    "knorm": _row(KNorm, "minus the norm of the key", EQUAL, "keys once", "2406.11430"),
    "keydiff": _row(KeyDiff, "minus the cosine to the mean key", EQUAL, "keys twice", "2504.15364", "kvpress"),
    "lagkv": _row(
        LagKV, "spread of key and value against the next 128 tokens, rank in its 128", EQUAL, "keys and values once",
        "2504.04704", "kvpress",
    ),
}  # fmt: skip

# What `lkv eval` compares where no methods are named.
COMPARED = ("random", "streaming_llm", "snapkv", "adakv", "kvzip")

COLUMNS = ("name", "class", "scores", "budgets", "when", "needs", "cost", "paper", "written after")


def rows() -> list[tuple[str, ...]]:
    """One for each method, in the order of `COLUMNS`."""
    return [
        (name, type(e.make()).__name__, e.score, e.budgets, e.when, e.needs, e.cost, e.paper or "-", e.source)
        for name, e in CATALOG.items()
    ]


def markdown() -> str:
    """The table of docs/policies.md."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for name, kind, *rest, paper, source in rows():
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:1].isdigit() else paper
        lines.append((f"`{name}`", f"`{kind}`", *rest, link, source))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
