"""The texts of the tasks, taken apart again: every question has its answer in the evidence, and one alone."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lkv import tasks
from lkv.tasks import Scene, Words
from lkv.tasks.scene import weave

FACT = re.compile(r"\bset ([A-Z]\w+(?: \w+)?) to (\d\d \d\d) \.")
DECOY = re.compile(r"\b(?:saw ([A-Z]\w+(?: \w+)?) at|met ([A-Z]\w+(?: \w+)?) by) (\d\d \d\d) \.")
LINK = re.compile(r"\blet ([A-Z]\w+) be ([A-Z]\w+|\d\d \d\d) \.")
SMALL = settings(max_examples=25)

indices = st.integers(0, 10**6)
splits = st.sampled_from(tasks.SPLITS)
lengths = st.integers(72, 400)


def facts(scene: Scene) -> list[tuple[str, str]]:
    return FACT.findall(scene.context)


def decoys(scene: Scene) -> list[tuple[str, str]]:
    return [(first or second, value) for first, second, value in DECOY.findall(scene.context)]


def check(scene: Scene, length: int) -> None:
    """What holds of every retrieval task."""
    results = facts(scene)
    assert [f"set {key} to {value} ." for key, value in results] == list(scene.evidence)  # once each, in this order
    assert len({value for _, value in results}) == len(results)
    assert tasks.words(scene.context) == length == len(Words().encode(scene.context))
    assert not set(decoys(scene)) & set(results)
    for question in scene.questions:
        requests, keys = re.fullmatch(r"(find|list) (.+) :", question.text).groups()
        keys = keys.split(" and ")
        values = [[value for name, value in results if name == key] for key in keys]
        assert question.expected == tuple(itertools.chain(*values))
        if requests == "find":
            assert all(len(found) == 1 for found in values)
        assert not any(word.isdigit() for word in question.text.split())  # the answer is in the text alone
        if len(keys) > 1:
            spoken = " . ".join(f"{key} {value}" for key, (value,) in zip(keys, values, strict=True))
        else:
            spoken = " . ".join(question.expected)
        assert question.answer == spoken + " . </s>"


@pytest.mark.parametrize(("task", "count", "requests"), [("single", 1, 1), ("multi_key", 8, 1), ("multi_query", 8, 2)])
@SMALL
@given(index=indices, split=splits, length=lengths)
def test_keys_of_one_value(task: str, count: int, requests: int, index: int, split: str, length: int) -> None:
    scene = tasks.scene(task, index, length, split=split)
    check(scene, length)
    keys = [key for key, _ in facts(scene)]
    assert len(keys) == len(set(keys)) == count == len(scene.questions)
    for question in scene.questions:
        assert question.text.startswith("find ")
        assert len(set(question.text.removesuffix(" :")[5:].split(" and "))) == len(question.expected) == requests
    if requests == 1:
        assert {question.text for question in scene.questions} == {f"find {key} :" for key in keys}


@SMALL
@given(index=indices, split=splits, length=lengths)
def test_keys_of_several_values(index: int, split: str, length: int) -> None:
    scene = tasks.scene("multi_value", index, length, split=split)
    check(scene, length)
    assert sorted(Counter(key for key, _ in facts(scene)).values()) == [3, 3, 3]
    assert {question.text for question in scene.questions} == {f"list {key} :" for key, _ in facts(scene)}
    assert all(len(question.expected) == 3 for question in scene.questions)


@SMALL
@given(index=indices, split=splits, length=lengths)
def test_keys_of_two_words_share_both(index: int, split: str, length: int) -> None:
    scene = tasks.scene("key_value", index, length, split=split)
    check(scene, length)
    keys = [tuple(key.split()) for key, _ in facts(scene)]
    names, attributes = ({key[i] for key in keys} for i in (0, 1))
    assert len(names) == len(attributes) == 3
    assert sorted(keys) == sorted(itertools.product(names, attributes))
    assert attributes <= set(Words.ATTRIBUTES) and names <= set(Words.NAMES)
    assert {question.text for question in scene.questions} == {f"find {' '.join(key)} :" for key in keys}


@pytest.mark.parametrize("task", tasks.RETRIEVAL)
def test_wanted_values_hardly_stand_elsewhere(task: str) -> None:
    """Two numbers out of 10 000 pairs: by chance, in less than one text of a hundred, and then behind another key."""
    elsewhere = 0
    for index in range(100):
        sample = tasks.make(task, index, 512)
        rest = sample.context
        for sentence in sample.evidence:
            rest = rest.replace(sentence, "|")
        elsewhere += any(value in rest for value in sample.expected)
    assert elsewhere <= 2


@pytest.mark.parametrize("task", tasks.RETRIEVAL)
def test_decoys_fill_their_share_and_some_have_the_keys_of_facts(task: str) -> None:
    share, same, count, before, lone = 0, 0, 0, 0, 0
    for index in range(40):
        scene = tasks.scene(task, index, 600)
        keys = {key for key, _ in facts(scene)}
        wrong = decoys(scene)
        tokens = sum(len(key.split()) + 5 for key, _ in wrong)
        assert 0.3 * 600 - 7 < tokens <= 0.3 * 600
        share += tokens
        count += len(wrong)
        same += sum(key in keys for key, _ in wrong)
        last = scene.context.rindex(scene.evidence[-1])
        before += sum(match.start() < last for match in DECOY.finditer(scene.context))
        lone += scene.context.startswith(scene.evidence[0])
    assert 0.2 < same / count < 0.45
    # They stand among the facts, not behind them.
    spread = before / count
    assert 0.3 < spread < 0.99 and lone < 5


def test_facts_stand_anywhere_and_in_any_order() -> None:
    places, together, grouped = [], 0, 0
    for index in range(60):
        scene = tasks.scene("single", index, 300)
        places.append(tasks.words(scene.context[: scene.context.index(scene.evidence[0]) + 1]) / 300)
        keys = [key for key, _ in facts(tasks.scene("multi_value", index, 300))]
        together += len(list(itertools.groupby(keys))) == 3
        names = [key.split()[0] for key, _ in facts(tasks.scene("key_value", index, 300))]
        grouped += len(list(itertools.groupby(names))) == 3
    assert sum(places) / 60 == pytest.approx(0.5, abs=0.12) and min(places) < 0.15 and max(places) > 0.85
    assert together <= 3 and grouped <= 3


@SMALL
@given(index=indices, split=splits, length=lengths, chains=st.integers(1, 3), hops=st.integers(0, 3))
def test_variables(index: int, split: str, length: int, chains: int, hops: int) -> None:
    scene = tasks.scene("variable_tracking", index, length, split=split, chains=chains, hops=hops)
    links = LINK.findall(scene.context)
    assert [f"let {name} be {value} ." for name, value in links] == list(scene.evidence)
    assert tasks.words(scene.context) == length
    value: dict[str, str] = {}
    chain: dict[str, list[str]] = {}
    for name, given_ in links:  # in the order of the text: what is handed on was given before
        assert name not in value
        value[name] = value.get(given_, given_)
        assert value[name][0].isdigit()
        chain.setdefault(value[name], []).append(name)
    assert len(chain) == chains == len(scene.questions)
    assert {question.text for question in scene.questions} == {f"who {x} :" for x in chain}
    for question in scene.questions:
        names = chain[question.text[4:-2]]
        assert question.expected == tuple(names) and len(names) == hops + 1
        assert question.answer == " ".join(names) + " . </s>"
        assert [given_ for name, given_ in links if name in names][1:] == names[:-1]  # each from the one before


def test_variables_by_default_are_three_chains_of_three_mixed() -> None:
    mixed = 0
    for index in range(20):
        scene = tasks.scene("variable_tracking", index, 200)
        assert [len(question.expected) for question in scene.questions] == [3, 3, 3]
        of = {name: i for i, question in enumerate(scene.questions) for name in question.expected}
        mixed += len(list(itertools.groupby(of[name] for name, _ in LINK.findall(scene.context)))) > 3
    assert mixed >= 15


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
@settings(max_examples=60)
@given(index=indices, split=splits, length=st.integers(1, 400), common=st.integers(1, 4))
def test_counted_words_stand_out_or_the_text_is_refused(
    task: str, index: int, split: str, length: int, common: int
) -> None:
    try:
        scene = tasks.scene(task, index, length, split=split, common=common)
    except ValueError as error:
        stand_out = f"its {common} most frequent words to stand out, got {length} tokens"
        assert f"expected a context long enough for {stand_out}" in str(error)
        assert length < 8 * 3 * common**2
        return
    counts = Counter(scene.context.split())
    (question,) = scene.questions
    assert sum(counts.values()) == length
    assert set(counts) <= set(Words.NAMES)
    top = [counts.pop(word) for word in question.expected]
    assert len(top) == common and min(top) > max(counts.values(), default=0)
    assert top == sorted(top, reverse=True)
    assert question.text == "most :" and question.answer == " ".join(question.expected) + " . </s>"


def test_shares_of_counted_words() -> None:
    """The most frequent have six tenths: of equal size, or as 1, 1/4 and 1/9; 24 others share the rest evenly."""
    for task, shares in (("common_words", (1, 1, 1)), ("frequent_words", (1, 1 / 4, 1 / 9))):
        scene = tasks.scene(task, 4, 1000)
        counts = Counter(scene.context.split())
        top = [counts.pop(word) for word in scene.questions[0].expected]
        assert top == pytest.approx([600 * share / sum(shares) for share in shares], abs=0.51)
        assert len(counts) == 24 and max(counts.values()) - min(counts.values()) <= 1
        # Shuffled: the first of them is in all parts of the text.
        words = scene.context.split()
        assert all(scene.questions[0].expected[0] in words[i : i + 100] for i in range(0, 1000, 100))


class TestWeave:
    @SMALL
    @given(
        seed=st.integers(0, 1000),
        sentences=st.lists(st.sampled_from(["A b .", "C .", "D e f g ."]), max_size=6),
        straws=st.lists(st.sampled_from(["x", "y z", "u v w"]), min_size=1, max_size=3),
        more=st.integers(0, 30),
    )
    def test_keeps_sentences_in_order_and_the_length(
        self, seed: int, sentences: list[str], straws: list[str], more: int
    ) -> None:
        length = sum(map(tasks.words, sentences)) + more
        if not length:
            return
        hay = itertools.cycle(straws)
        drawn: list[str] = []
        text = weave(random.Random(seed), sentences, lambda: drawn.append(next(hay)) or drawn[-1], length, tasks.words)
        words = text.split()
        longest = max(map(tasks.words, straws))
        assert length - longest < len(words) <= length
        assert [word for word in words if word.isupper() or word in "b e f g ."] == " ".join(sentences).split()
        filler = [word for word in words if word in {"x", "y", "z", "u", "v", "w"}]
        assert " ".join(drawn).split()[: len(filler)] == filler  # as it was drawn; the last may not have fitted

    def test_every_place_is_as_likely(self) -> None:
        straws = ["x", "y"]
        texts = Counter(
            weave(random.Random(seed), ["A ."], iter([*straws, "z"]).__next__, 4, tasks.words) for seed in range(300)
        )
        assert set(texts) == {"A . x y", "x A . y", "x y A ."}
        assert min(texts.values()) > 70

    def test_what_fits_exactly_needs_no_filler(self) -> None:
        def none() -> str:
            raise AssertionError

        assert weave(random.Random(0), ["a b .", "c ."], none, 5, tasks.words) == "a b . c ."
        with pytest.raises(
            ValueError, match="expected a context of at least 5 tokens, which its sentences need, got 4"
        ):
            weave(random.Random(0), ["a b .", "c ."], none, 4, tasks.words)
