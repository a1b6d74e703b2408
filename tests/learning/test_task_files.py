"""Files of RULER and LongBench become samples, and what is wrong with one is said with its line and field."""

from __future__ import annotations

import json
import sys

import pytest

from lkv.extras import MissingPackage
from lkv.tasks import longbench
from lkv.tasks.files import load

NEEDLES = (
    "Some special magic numbers are hidden in the text.\nWhat is this? The grass is green. One of the special magic "
    "numbers for old-cat is: 1234567.\nWhat are all the special magic numbers for old-cat mentioned in the provided "
    "text?"
)
PREFIX = " The special magic numbers for old-cat mentioned in the provided text are"
RULER = {"index": 0, "input": NEEDLES, "outputs": ["1234567"], "length": 60}
LONGBENCH = {
    "input": "Who wrote {it}?",
    "context": "Ann wrote the {letter}.",
    "answers": ["Ann", "Ann B."],
    "length": 4,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "a1",
}


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


def test_ruler_record_is_split_where_its_last_question_begins(tmp_path):
    path = write(tmp_path / "niah_multivalue" / "validation.jsonl", [RULER, {**RULER, "answer_prefix": PREFIX}])
    plain, prefixed = load("ruler", path)
    assert plain.context + plain.question == NEEDLES
    assert plain.question.startswith("\nWhat are all")
    assert prefixed.question == plain.question + PREFIX
    assert (plain.task, plain.index, prefixed.index) == ("niah_multivalue", 0, 1)
    assert plain.expected == ("1234567",) and plain.limit == 128


def test_later_of_both_markers_counts_and_a_marker_may_be_given(tmp_path):
    text = "Documents.\nWhat for?\nQuestion: an example.\nMore.\nQuestion: Which city? Answer:"
    path = write(tmp_path / "qa_1.jsonl", [{**RULER, "input": text}])
    (sample,) = load("ruler", path)
    assert sample.question == "\nQuestion: Which city? Answer:"
    assert (sample.task, sample.limit) == ("qa_1", 32)
    (sample,) = load("ruler", path, marker="More.")
    assert sample.context == "Documents.\nWhat for?\nQuestion: an example.\n"


def test_fields_of_their_own_for_context_and_question(tmp_path):
    record = {"context": "A text.", "question": " What?", "answer_prefix": " It is", "answer": ["x", "y"], "task": "vt"}
    (sample,) = load("ruler", write(tmp_path / "any.jsonl", [record]))
    assert (sample.context, sample.question, sample.task) == ("A text.", " What? It is", "vt")
    assert sample.expected == ("x", "y") and sample.limit == 30


def test_longbench_record_is_put_into_the_prompt_of_its_subset(tmp_path):
    (sample,) = load("longbench", write(tmp_path / "x.jsonl", [LONGBENCH]))
    whole = (
        longbench.PROMPTS["hotpotqa"].replace("{context}", LONGBENCH["context"]).replace("{input}", LONGBENCH["input"])
    )
    assert sample.context + sample.question == whole
    assert sample.context.endswith("Ann wrote the {letter}.") and "Who wrote {it}?" in sample.question
    assert sample.expected == ("Ann", "Ann B.") and sample.limit == 32 and sample.task == "hotpotqa"


def test_longbench_prompts_may_be_given_and_subset_comes_from_the_name(tmp_path):
    path = write(tmp_path / "qasper_e.jsonl", [without(LONGBENCH, "dataset")])
    (sample,) = load("longbench", path, prompts={"qasper": "Read {context} and say: {input}"})
    assert sample.context == "Read Ann wrote the {letter}."
    assert sample.question == " and say: Who wrote {it}?"
    assert sample.task == "qasper_e"


@pytest.mark.parametrize("subset", longbench.LIMITS)
def test_every_subset_has_a_prompt(tmp_path, subset):
    record = {**LONGBENCH, "dataset": subset, "all_classes": ["a", "b"]}
    (sample,) = load("longbench", write(tmp_path / "x.jsonl", [record]))
    assert sample.context.endswith(LONGBENCH["context"]) and sample.question
    assert sample.classes == ("a", "b")


def test_only_the_first_records(tmp_path):
    assert len(load("longbench", write(tmp_path / "x.jsonl", [LONGBENCH] * 5), count=2)) == 2


@pytest.mark.parametrize("name", ["input", "outputs"])
def test_ruler_record_without_a_field(tmp_path, name):
    path = write(tmp_path / "niah.jsonl", [RULER, without(RULER, name)])
    with pytest.raises(
        ValueError, match=rf"niah.jsonl line 2: expected the field '{name}', .*got a record with 'index'"
    ):
        load("ruler", path)


@pytest.mark.parametrize("name", ["input", "context", "answers"])
def test_longbench_record_without_a_field(tmp_path, name):
    path = write(tmp_path / "x.jsonl", [without(LONGBENCH, name)])
    with pytest.raises(ValueError, match=rf"x.jsonl line 1: expected the field '{name}', .*got a record with '"):
        load("longbench", path)


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("ruler", {**RULER, "outputs": "12"}, "'outputs', a list of one or more strings, got '12'"),
        ("ruler", {**RULER, "outputs": []}, r"'outputs', a list of one or more strings, got \[\]"),
        ("ruler", {**RULER, "outputs": [12]}, r"'outputs', a list of one or more strings, got \[12\]"),
        (
            "ruler",
            {**RULER, "input": "no question"},
            "question that begins with .* got one that ends with 'no question'",
        ),
        ("longbench", {**LONGBENCH, "context": 3}, "'context', a string, got 3"),
        ("longbench", {**LONGBENCH, "dataset": "other"}, "'dataset', one of narrativeqa, .*got 'other'"),
        ("longbench", {**LONGBENCH, "dataset": "trec"}, "'all_classes', a list of one or more strings, got None"),
    ],
)
def test_field_of_another_kind(tmp_path, format, record, message):
    with pytest.raises(ValueError, match=message):
        load(format, write(tmp_path / "x.jsonl", [record]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.jsonl: expected at least one record, got an empty file"),
        ("\n \n", "x.jsonl: expected at least one record, got an empty file"),
        ('{"input": 1}\n{"input"', "x.jsonl line 1: expected the field 'input'"),
        ('\n{"input"', r"x.jsonl line 2: expected a JSON object, got '\{\"input\"'"),
        ("[1, 2]", r"x.jsonl line 1: expected a JSON object, got '\[1, 2\]'"),
    ],
)
def test_file_that_holds_no_records(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load("ruler", tmp_path / "x.jsonl")


def test_no_file_no_format_no_context_in_a_prompt(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file of JSON lines, got .*none.jsonl"):
        load("ruler", tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="expected a format of ruler, longbench, got 'csv'"):
        load("csv", tmp_path / "none.jsonl")
    path = write(tmp_path / "x.jsonl", [LONGBENCH])
    with pytest.raises(ValueError, match="expected a prompt of hotpotqa with {context}, got 'none'"):
        load("longbench", path, prompts={"hotpotqa": "none"})


def test_data_set_by_name(tmp_path, monkeypatch):
    """A stand-in for the library: what is asked of it, and what becomes of its errors."""

    class Library:
        @staticmethod
        def load_dataset(name, configuration, split):
            if name == "no/such":
                raise OSError("not on the hub")
            assert (name, configuration, split) == ("some/LongBench", "hotpotqa", "validation")
            return [LONGBENCH]

    monkeypatch.setitem(sys.modules, "datasets", Library)
    (sample,) = load("longbench", "some/LongBench:hotpotqa", split="validation")
    assert sample.task == "hotpotqa"
    with pytest.raises(ValueError, match="expected a data set that loads, got 'no/such', split 'test': not on the hub"):
        load("longbench", "no/such")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"package 'datasets' .* pip install 'lkv-ext\[longbench\]'"):
        load("longbench", "some/LongBench")
