"""Tables of an evaluation on passages: sums over tokens, and intervals of passages drawn with all their questions."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from lkv.evaluate.results import Cell
from lkv.evaluate.text_report import rows, shares, tables


def fact(right: int, tokens: int, kl: float, kind: str = "word", **more: object) -> dict:
    return {"kind": kind, "tokens": tokens, "right": right, "kl": kl, "same": right, "exact": right == tokens, **more}


def cell(passage: int, method: str, facts: list[dict], kl: float = 1.0, **more: object) -> Cell:
    continuation = {"tokens": 10, "right": 4, "kl": kl, "same": 8}
    seconds = {"prefill": 1.0, "second_pass": 0.0, "scores": 0.25, "eviction": 0.125}
    retention = 1.0 if method == "full" else 0.15
    domain, document = "ab"[passage % 2], f"{passage // 2}.txt"
    made = Cell(passage, domain, document, method, retention, 100, [[10, 20], [15, 15]], facts, continuation, seconds)
    return replace(made, **more)


LKV = [
    cell(0, "lkv", [fact(2, 2, 0.1), fact(1, 4, 0.5, "date")], 1.0),
    cell(1, "lkv", [fact(3, 3, 0.2), fact(2, 2, 0.0)], 2.0),
    cell(2, "lkv", [fact(0, 2, 0.9), fact(1, 2, 0.4)], 3.0),
]
OTHER = [
    cell(0, "snapkv", [fact(1, 2, 0.5), fact(1, 4, 0.5, "date")], 2.0),
    cell(1, "snapkv", [fact(3, 3, 0.2), fact(0, 2, 1.0)], 2.0),
    cell(2, "snapkv", [fact(2, 2, 0.3), fact(1, 2, 0.4)], 1.0),
]


def by_hand(sums: list[float], counts: list[float]) -> list[float]:
    """Of all 27 ways to draw three passages, each as likely; what the 2.5 and 97.5 % draws are close to."""
    drawn = product(range(3), repeat=3)
    means = sorted(sum(sums[i] for i in x) / sum(counts[i] for i in x) for x in drawn)
    # The least and the largest have 1/27, which is more than 2.5 %.
    return [sum(sums) / sum(counts), means[0], means[-1]]


def test_a_passage_is_drawn_with_all_of_its_questions() -> None:
    (row,) = [x for x in rows(LKV) if x["domain"] == "all"]
    assert row["facts"]["exact"] == pytest.approx(by_hand([1, 2, 0], [2, 2, 2]))
    assert row["facts"]["tokens"] == pytest.approx(by_hand([3, 5, 1], [6, 5, 4]))
    assert row["facts"]["top1"] == pytest.approx(by_hand([3, 5, 1], [6, 5, 4]))
    assert row["facts"]["kl"] == pytest.approx(by_hand([0.6, 0.2, 1.3], [6, 5, 4]))
    assert row["continuation"]["kl"] == pytest.approx(by_hand([1, 2, 3], [10, 10, 10]))
    assert row["continuation"]["top1"] == pytest.approx([0.8] * 3)
    assert (row["passages"], row["documents"], row["kept"]) == (3, 3, pytest.approx(0.15))
    assert row["seconds"] == {"prefill": 1.0, "second_pass": 0.0, "scores": 0.25, "eviction": 0.125}


def test_kinds_of_values_apart() -> None:
    """Of the passages that have some of a kind, drawn with all of these."""
    (row,) = [x for x in rows([*LKV, *OTHER]) if x["domain"] == "all" and x["method"] == "snapkv"]
    date, word = row["kinds"]["date"], row["kinds"]["word"]
    assert list(row["kinds"]) == ["date", "word"] and (date["questions"], word["questions"]) == (1, 5)
    assert date["exact"] == [0.0] * 3 and date["kl"] == [0.125] * 3 and date["tokens"] == [0.25] * 3
    assert word["kl"] == pytest.approx(by_hand([0.5, 1.2, 0.7], [2, 5, 4]))
    assert word["ahead"]["facts kl"] == pytest.approx(by_hand([0.4, 1.0, -0.6], [2, 5, 4]))
    assert date["ahead"] == {"facts kl": [0.0] * 3, "facts exact": [0.0] * 3}
    (row,) = [x for x in rows([*LKV, *OTHER]) if x["domain"] == "all" and x["method"] == "lkv"]
    assert "ahead" not in row["kinds"]["word"]


def test_kinds_are_in_the_order_of_their_names() -> None:
    kinds = ["word", "code", "name", "date", "number", "amount", "place"]
    (row,) = rows([cell(0, "lkv", [fact(1, 2, 0.5, kind) for kind in kinds])])
    assert list(row["kinds"]) == sorted(kinds)


def test_the_reference_is_ahead_where_it_has_more_right_and_loses_less() -> None:
    found = {x["method"]: x for x in rows([*OTHER, *LKV][::-1]) if x["domain"] == "all"}
    assert "ahead" not in found["lkv"]
    ahead = found["snapkv"]["ahead"]
    assert ahead["facts exact"] == pytest.approx(by_hand([1, 1, -1], [2, 2, 2]))
    assert ahead["facts kl"] == pytest.approx(by_hand([0.4, 1.0, -0.6], [6, 5, 4]))
    assert ahead["continuation kl"] == pytest.approx(by_hand([1, 0, -2], [10, 10, 10]))
    back = {x["method"]: x for x in rows([*OTHER, *LKV], "snapkv") if x["domain"] == "all"}["lkv"]["ahead"]
    assert back["facts kl"][0] == pytest.approx(-ahead["facts kl"][0])


def test_the_same_passages_are_compared_or_none() -> None:
    assert all("ahead" not in x for x in rows([*OTHER, *LKV[1:]]) if x["domain"] == "all")
    assert all("ahead" not in x for x in rows([*OTHER, *(replace(x, retention=0.3) for x in LKV)]))


def test_domains_apart() -> None:
    found = {(x["domain"], x["method"]): x for x in rows([*LKV, *OTHER])}
    assert set(found) == {(d, m) for d in ("all", "a", "b") for m in ("lkv", "snapkv")}
    assert found["a", "lkv"]["passages"] == 2 and found["b", "lkv"]["facts"]["exact"][0] == 1.0
    assert found["b", "snapkv"]["ahead"]["facts exact"] == [0.5] * 3
    assert {x["domain"] for x in rows(LKV[:1])} == {"all"}  # one domain is all


def test_shares_of_heads_are_means_over_passages() -> None:
    more = replace(LKV[1], rows=[[20, 20], [0, 200]], tokens=200)
    found = shares([LKV[0], more, cell(0, "full", [])])
    assert found["lkv"] == {"0.15": [[0.1, 0.15], [0.075, 0.575]]} and set(found) == {"lkv", "full"}
    thirds = replace(LKV[0], rows=[[1, 2], [3, 3]], tokens=3)
    assert shares([thirds])["lkv"]["0.15"] == [[0.3333, 0.6667], [1.0, 1.0]]  # files stay short


def test_tables() -> None:
    greedy = [replace(x, facts=[{**f, "greedy": 0.5} for f in x.facts]) for x in LKV]
    text = tables(rows([*greedy, *OTHER, cell(0, "full", [fact(2, 2, 0.0)])]))
    together, domains, costs = (part.splitlines() for part in text.split("\n\n"))
    head, _, lkv, snapkv, full = ([x.strip() for x in line.strip("|").split("|")] for line in together)
    assert head == [
        "method", "kept", "facts exact", "facts tokens", "facts kl", "facts top1", "facts greedy", "continuation kl",
        "continuation top1", "lkv ahead: facts kl", "lkv ahead: facts exact", "lkv ahead: continuation kl",
    ]  # fmt: skip
    assert lkv[:3] == ["lkv", "15.0%", "0.500 (0.000 to 1.000)"] and lkv[9:] == [""] * 3
    assert snapkv[6] == "" and snapkv[10] == "+0.167 (-0.500 to +0.500)" and full[0] == "full"
    assert [x.strip() for x in domains[0].strip("|").split("|")][2:5] == [
        "a: facts kl", "a: facts exact", "a: continuation kl",
    ]  # fmt: skip
    assert len(domains) == 5 and domains[4].count("|") == domains[0].count("|")  # nothing of full in b
    assert snapkv[4].startswith("0.1933 (") and snapkv[9].startswith("+0.0533 (")  # of nats a digit more
    assert lkv[3] == "0.600"  # without its interval
    assert "scores, CPU s" in costs[0] and "0.250" in costs[2] and len(costs) == 2 + 3


def test_costs_are_means_over_retentions() -> None:
    more = [replace(x, retention=0.3, seconds={**x.seconds, "scores": 0.75}) for x in LKV]
    costs = tables(rows([*LKV, *more])).split("\n\n")[-1].splitlines()
    assert len(costs) == 3 and [x.strip() for x in costs[2].strip("|").split("|")] == [
        "lkv", "1.000", "0.000", "0.500", "0.125",
    ]  # fmt: skip


def test_only_one_of_facts_and_continuation() -> None:
    bare = [replace(x, facts=[]) for x in LKV]
    (row, *_) = rows(bare)
    assert "facts" not in row and "kinds" not in row and row["continuation"]["kl"][0] == pytest.approx(0.2)
    assert "facts" not in tables(rows(bare))
    (row, *_) = rows([replace(x, continuation=None) for x in LKV])
    assert "continuation" not in row and "continuation" not in tables([row])
