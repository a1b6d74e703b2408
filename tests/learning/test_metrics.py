"""Metrics of RULER and LongBench against values worked out by hand."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lkv.evaluate import metrics
from lkv.extras import MissingPackage
from lkv.tasks.files import FileSample
from lkv.tasks.longbench import CLASSIFIED, LIMITS

# LongBench's `dataset2metric`.
PUBLISHED = {
    metrics.qa_f1: "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
    metrics.qa_f1_zh: "multifieldqa_zh",
    metrics.rouge_l: "gov_report qmsum multi_news samsum",
    metrics.rouge_l_zh: "dureader vcsum",
    metrics.classification: "trec lsht",
    metrics.count: "passage_count",
    metrics.retrieval: "passage_retrieval_en passage_retrieval_zh",
    metrics.code_similarity: "lcc repobench-p",
}
WORDS = st.lists(st.sampled_from(["cat", "dog", "theme", "another", "x2", "über"]), max_size=6)


def sample(task, expected, format="longbench", classes=()):
    return FileSample(task, 0, "text", "question", expected[0], tuple(expected), (), 0, format, tuple(classes), 32)


def test_ruler_counts_strings_and_its_question_answering_any_of_them():
    needles = sample("niah_multivalue", ["1234", "5678"], "ruler")
    assert metrics.score("They are 1234 and 99", needles) == 0.5
    assert metrics.score("5678, 1234", needles) == 1.0
    assert metrics.score("", needles) == 0.0
    assert metrics.score("5678 5678", needles) == 0.5
    answers = sample("qa_1", ["Paris", "City of Light"], "ruler")
    assert metrics.score(" in PARIS.", answers) == 1.0
    assert metrics.score("the city of light", answers) == 1.0
    assert metrics.score("Rome", answers) == 0.0
    # Only what is called so is question answering.
    assert metrics.score("Paris", sample("niah_qa", ["Paris", "City of Light"], "ruler")) == 0.5


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ("VAR abc, Var DEF", ["var ABC", "VAR def", "VAR ghi"], 2 / 3),  # in any case
        ("new\tyork", ["new\nyork"], 1.0),  # control characters are line breaks
        ("new\x00york", ["new york"], 0.0),
        ("\x01 Paris", ["\n paris"], 0.0),  # those in front are dropped
    ],
)
def test_ruler_reads_an_answer_as_its_own_script_does(text, expected, value):
    assert metrics.score(text, sample("vt", expected, "ruler")) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ("The Cat, sat!", "a cat sat", 1.0),  # articles, case and punctuation do not count
        ("cat sat down", "cat ran", 2 * 1 / (3 + 2)),
        ("cat cat dog", "cat cat cat", 2 * 2 / (3 + 3)),  # bags: two cats are common
        ("an owl", "owl", 1.0),
        ("another theme", "theme another", 1.0),  # articles within words stay
        ("the-cat", "thecat", 1.0),  # punctuation goes first, and leaves no blank
        ("U.S.A.", "usa", 1.0),
        ("“cat”", "cat", 0.0),  # of ASCII alone
        ("cat\n\tdog ", "dog cat", 1.0),
        ("cat“a”dog", "cat“ ”dog", 1.0),  # an article leaves a blank
        ("a", "the", 0.0),  # nothing is left
        ("", "cat", 0.0),
        ("cat", "", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_qa_f1(text, expected, value):
    assert metrics.qa_f1(text, expected) == pytest.approx(value)


@settings(max_examples=60)
@given(WORDS, WORDS, st.randoms(use_true_random=False))
def test_qa_f1_is_of_precision_and_recall_and_sees_bags_of_plain_words(words, expected, rng):
    left = list(expected)
    same = sum(1 for word in words if word in left and (left.remove(word) or True))
    wanted = 0.0
    if same:
        precision, recall = same / len(words), same / len(expected)
        wanted = 2 * precision * recall / (precision + recall)
    assert metrics.qa_f1(" ".join(words), " ".join(expected)) == pytest.approx(wanted)
    rng.shuffle(words)
    dressed = " ".join(rng.choice(["{}", "a {}", "the {},", "An {}!"]).format(word.upper()) for word in words)
    assert metrics.qa_f1(dressed, " ".join(expected)) == pytest.approx(wanted)


def test_best_of_the_expected_answers_and_first_line_of_few_shot_subsets():
    assert metrics.score("red house", sample("hotpotqa", ["blue", "red house", "red"])) == 1.0
    assert metrics.score("\nAnn\nPassage: more", sample("triviaqa", ["Ann"])) == 1.0
    assert metrics.score("\nAnn\nPassage: more", sample("hotpotqa", ["Ann"])) == pytest.approx(2 / (3 + 1))
    assert metrics.score("Ann", sample("triviaqa_e", ["Ann"])) == 1.0
    # The first line may be empty but for blanks.
    assert metrics.score(" \nAnn", sample("triviaqa", ["Ann"])) == 0.0


@pytest.mark.parametrize("subset", ["trec", "triviaqa", "samsum", "lsht", "trec_e"])
def test_few_shot_subsets_stop_at_a_line(subset):
    if subset == "samsum":
        pytest.importorskip("rapidfuzz")
    assert metrics.score("\n\nAnn\nBob", sample(subset, ["Ann"], classes=["Ann", "Bob"])) == 1.0
    assert metrics.score("Bob\nAnn", sample(subset, ["Ann"], classes=["Ann", "Bob"])) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Other entity", 1.0),  # "entity" is part of the expected name and drops out
        ("Other entity, or Number", 0.5),
        ("Number", 0.0),
        ("entity", 0.0),
        ("", 0.0),
    ],
)
def test_classification(text, value):
    assert metrics.score(text, sample("trec", ["Other entity"], classes=["entity", "Other entity", "Number"])) == value


def test_classification_counts_all_that_are_named():
    classes = ["a1", "b2", "c3", "c"]
    assert metrics.classification("c3 b2 a1", "a1", classes) == pytest.approx(1 / 4)  # "c" is part of what is written
    assert metrics.classification("c3 a1", "c3", classes) == pytest.approx(
        1 / 2
    )  # but not where it is part of the name
    assert metrics.classification("A1", "a1", classes) == 0.0  # as they are written
    assert metrics.score("b2", sample("lsht", ["a1", "b2"], classes=classes)) == 1.0  # the best of several


def test_numbers():
    assert metrics.count("3 or 4, rather 3", "3") == pytest.approx(2 / 3)
    assert metrics.count("none", "3") == metrics.count("33", "3") == 0.0
    assert metrics.score("Paragraph 12", sample("passage_retrieval_en", ["Paragraph 12"])) == 1.0
    assert metrics.score("1 or 12", sample("passage_retrieval_en", ["Paragraph 12"])) == 0.5
    assert metrics.score("段落7", sample("passage_retrieval_zh", ["段落7"])) == 1.0
    assert metrics.score("7 7 8", sample("passage_count", ["7"])) == pytest.approx(2 / 3)
    assert metrics.score("120 1 2", sample("passage_retrieval_en", ["Paragraph 12"])) == 0.0  # numbers, not digits
    with pytest.raises(ValueError, match="expected an answer of the form 'Paragraph 7' or '段落7', got '12'"):
        metrics.retrieval("12", "12")


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ("the cat sat", "the cat was here", 2 * 2 / (3 + 4)),
        ("d e. a c", "a b c. d e.", 2 * 4 / (4 + 5)),  # sentences are matched in any order
        ("c b a", "a b c", 2 * 1 / (3 + 3)),  # words within one are not
        ("a a a", "a b", 2 * 1 / (1 + 2)),  # a word counts once
        ("a b c d", "a x c y", 2 * 2 / (4 + 4)),  # with gaps on both sides
        ("a. a. b", "a", 2 * 1 / (2 + 1)),  # within all sentences together
        ("a  b\nc", "a b c", 1.0),
        ("a. . .b", "a. b.", 1.0),  # empty sentences are none
        ("Ann", "ann", 0.0),
        ("über", "über", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        (".", ".", 0.0),
    ],
)
def test_rouge_l(text, expected, value):
    pytest.importorskip("rapidfuzz")
    assert metrics.rouge_l(text, expected) == pytest.approx(value)


def test_code_similarity():
    pytest.importorskip("rapidfuzz")
    assert metrics.code_similarity("\n```\n# says\nab\nmore", "abcd") == 0.67  # 2 insertions, 6 characters
    assert metrics.code_similarity("return x", "return x") == 1.0
    assert metrics.code_similarity("// nothing else", "x") == metrics.code_similarity("", "x") == 0.0
    assert metrics.code_similarity("a // b\n# c\n`d`\nxy\nab", "ab") == 0.0  # the first line that is left
    assert metrics.code_similarity("  ab", "ab") == 0.67  # blanks count: 2 of 6
    assert metrics.code_similarity("AB", "ab") == 0.0
    assert metrics.code_similarity("abc", "ab") == 0.8  # 1 of 5
    assert metrics.code_similarity("x", "") == 0.0
    assert metrics.score("abcd", sample("lcc", ["abxy", "abcx"])) == 0.75  # the best of several


def test_chinese():
    pytest.importorskip("jieba")
    assert metrics.qa_f1_zh("北京\uff0c天安门。", "天安门") == pytest.approx(2 * 1 / (2 + 1))
    assert metrics.qa_f1_zh("天安门\uff5e《北京》\uff0b.!", "北京 天安门") == 1.0  # full width and ASCII, in any order
    assert metrics.qa_f1_zh("GPU 北京", "gpu北京") == 1.0
    assert metrics.qa_f1_zh("北京北京天安门", "北京") == pytest.approx(2 * 1 / (3 + 1))  # bags
    assert metrics.qa_f1_zh("。", "天安门") == metrics.qa_f1_zh("。", "。") == 0.0
    assert metrics.qa_f1_zh("3+4", "34") == 0.0  # as digits they are two words
    pytest.importorskip("rapidfuzz")
    assert metrics.rouge_l_zh("北京天安门", "天安门") == pytest.approx(2 * 1 / (2 + 1))
    assert metrics.rouge_l_zh("天安门北京", "北京天安门") == pytest.approx(2 * 1 / (2 + 2))
    assert metrics.score("天安门", sample("vcsum", ["北京", "天安门"])) == 1.0
    assert metrics.score("北京天安门", sample("multifieldqa_zh", ["天安门"])) == pytest.approx(2 * 1 / (2 + 1))


def test_every_subset_has_the_metric_that_was_published():
    published = {subset: metric for metric, subsets in PUBLISHED.items() for subset in subsets.split()}
    assert published == metrics.METRICS
    assert set(LIMITS) == set(published)
    assert set(CLASSIFIED) == {subset for subset, metric in published.items() if metric is metrics.classification}


@pytest.mark.parametrize(
    ("subset", "package"),
    [("multifieldqa_zh", "jieba"), ("dureader", "jieba"), ("qmsum", "rapidfuzz"), ("lcc", "rapidfuzz")],
)
def test_missing_package_is_named_before_anything_runs(monkeypatch, subset, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"package '{package}.*' for .*pip install 'lkv-ext\[longbench\]'"):
        metrics.check_packages([sample("hotpotqa", ["a"]), sample(subset, ["a"]), sample("qasper", ["a"])])
    metrics.check_packages([sample("hotpotqa", ["a"]), sample("niah", ["a"], "ruler")])
