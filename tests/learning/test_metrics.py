"""Metrics of RULER and LongBench against values worked out by hand."""

from __future__ import annotations

import sys

import pytest

from lkv.evaluate import metrics
from lkv.extras import MissingPackage
from lkv.tasks.files import FileSample
from lkv.tasks.longbench import LIMITS


def sample(task, expected, format="longbench", classes=()):
    return FileSample(task, 0, "text", "question", expected[0], tuple(expected), (), 0, format, tuple(classes), 32)


def test_ruler_counts_strings_and_its_question_answering_any_of_them():
    needles = sample("niah_multivalue", ["1234", "5678"], "ruler")
    assert metrics.score("They are 1234 and 99", needles) == 0.5
    assert metrics.score("5678, 1234", needles) == 1.0
    assert metrics.score("", needles) == 0.0
    answers = sample("qa_1", ["Paris", "City of Light"], "ruler")
    assert metrics.score(" in PARIS.", answers) == 1.0
    assert metrics.score("Rome", answers) == 0.0


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ("The Cat, sat!", "a cat sat", 1.0),  # articles, case and punctuation do not count
        ("cat sat down", "cat ran", 2 * 1 / (3 + 2)),
        ("cat cat dog", "cat cat cat", 2 * 2 / (3 + 3)),  # bags: two cats are common
        ("", "cat", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_qa_f1(text, expected, value):
    assert metrics.qa_f1(text, expected) == pytest.approx(value)


def test_best_of_the_expected_answers_and_first_line_of_few_shot_subsets():
    assert metrics.score("red house", sample("hotpotqa", ["blue", "red house", "red"])) == 1.0
    assert metrics.score("\nAnn\nPassage: more", sample("triviaqa", ["Ann"])) == 1.0
    assert metrics.score("\nAnn\nPassage: more", sample("hotpotqa", ["Ann"])) == pytest.approx(2 / (3 + 1))
    assert metrics.score("Ann", sample("triviaqa_e", ["Ann"])) == 1.0


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


def test_numbers():
    assert metrics.count("3 or 4, rather 3", "3") == pytest.approx(2 / 3)
    assert metrics.count("none", "3") == metrics.count("33", "3") == 0.0
    assert metrics.score("Paragraph 12", sample("passage_retrieval_en", ["Paragraph 12"])) == 1.0
    assert metrics.score("1 or 12", sample("passage_retrieval_en", ["Paragraph 12"])) == 0.5
    assert metrics.score("段落7", sample("passage_retrieval_zh", ["段落7"])) == 1.0
    with pytest.raises(ValueError, match="expected an answer of the form 'Paragraph 7' or '段落7', got '12'"):
        metrics.retrieval("12", "12")


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ("the cat sat", "the cat was here", 2 * 2 / (3 + 4)),
        ("d e. a c", "a b c. d e.", 2 * 4 / (4 + 5)),  # sentences are matched in any order
        ("c b a", "a b c", 2 * 1 / (3 + 3)),  # words within one are not
        ("a a a", "a b", 2 * 1 / (1 + 2)),  # a word counts once
        ("Ann", "ann", 0.0),
        ("über", "über", 1.0),
        ("", "a", 0.0),
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


def test_chinese():
    pytest.importorskip("jieba")
    assert metrics.qa_f1_zh("北京\uff0c天安门。", "天安门") == pytest.approx(2 * 1 / (2 + 1))
    assert metrics.qa_f1_zh("。", "天安门") == 0.0
    pytest.importorskip("rapidfuzz")
    assert metrics.rouge_l_zh("北京天安门", "天安门") == pytest.approx(2 * 1 / (2 + 1))


def test_every_subset_has_a_metric():
    assert set(metrics.METRICS) == set(LIMITS)


@pytest.mark.parametrize(
    ("subset", "package"),
    [("multifieldqa_zh", "jieba"), ("dureader", "jieba"), ("qmsum", "rapidfuzz"), ("lcc", "rapidfuzz")],
)
def test_missing_package_is_named_before_anything_runs(monkeypatch, subset, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"package '{package}.*' for .*pip install 'lkv-ext\[longbench\]'"):
        metrics.check_packages([sample("hotpotqa", ["a"]), sample(subset, ["a"])])
