"""Files of RULER and LongBench become samples, and errors name their line and field."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

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


def test_answers_of_longbench_are_128_tokens_at_most_and_512_of_summaries():
    """LongBench's `dataset2maxlen.json`."""
    published = {
        "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "multifieldqa_zh": 64, "hotpotqa": 32, "2wikimqa": 32,
        "musique": 32, "dureader": 128, "gov_report": 512, "qmsum": 512, "multi_news": 512, "vcsum": 512, "trec": 64,
        "triviaqa": 32, "samsum": 128, "lsht": 64, "passage_count": 32, "passage_retrieval_en": 32,
        "passage_retrieval_zh": 32, "lcc": 64, "repobench-p": 64,
    }  # fmt: skip
    assert published == longbench.LIMITS and list(longbench.PROMPTS) == list(longbench.LIMITS)
    assert longbench.FEW_SHOT == ("trec", "triviaqa", "samsum", "lsht")


@pytest.mark.parametrize(
    ("task", "limit"),
    [
        ("niah_single_1", 128), ("niah_multiquery", 128), ("vt", 30), ("variable_tracking", 30), ("cwe", 120),
        ("common_words_extraction", 120), ("fwe", 50), ("freq_words_extraction", 50), ("qa_2", 32), ("other", 128),
    ],
)  # fmt: skip
def test_answers_of_ruler_are_as_long_as_it_has_them(tmp_path, task, limit):
    path = write(tmp_path / task / "validation.jsonl", [RULER])
    (sample,) = load("ruler", path)
    assert (sample.task, sample.limit) == (task, limit)


@pytest.mark.parametrize(
    ("place", "task"),
    [
        ("niah_single_1/validation.jsonl", "niah_single_1"), ("niah_single_1/test.jsonl", "niah_single_1"),
        ("4096/vt.jsonl", "vt"), ("vt/train.jsonl", "train"), ("cwe/cwe", "cwe"),
    ],
)  # fmt: skip
def test_task_is_named_by_the_file_or_its_folder(tmp_path, place, task):
    assert load("ruler", write(tmp_path / place, [RULER]))[0].task == task


def test_name_of_a_file_without_a_folder_or_an_ending_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("validation.jsonl", "validation"):
        write(tmp_path / name, [RULER])
        assert load("ruler", name)[0].task == "validation"


def test_all_expected_answers_are_kept_in_their_order(tmp_path):
    (sample,) = load("ruler", write(tmp_path / "vt.jsonl", [{**RULER, "outputs": ["b", "a", "c"]}]))
    assert (sample.expected, sample.answer, sample.format, sample.classes) == (("b", "a", "c"), "b a c", "ruler", ())
    record = {**LONGBENCH, "answers": ["b", "a"], "dataset": "trec", "all_classes": ["x", "b", "a"]}
    (sample,) = load("longbench", write(tmp_path / "x.jsonl", [record]))
    assert (sample.expected, sample.answer, sample.format) == (("b", "a"), "b", "longbench")
    assert sample.classes == ("x", "b", "a") and sample.evidence == () and sample.evidence_tokens == 0
    for none in ([], None):
        (sample,) = load("longbench", write(tmp_path / "x.jsonl", [{**LONGBENCH, "all_classes": none}]))
        assert sample.classes == ()


def test_only_the_first_records(tmp_path):
    path = write(tmp_path / "x.jsonl", [{**LONGBENCH, "input": str(i)} for i in range(5)])
    path.write_text(path.read_text() + "no record\n")  # which is not read
    samples = load("longbench", path, count=2)
    assert [(s.index, "Question: 0" in s.question) for s in samples] == [(0, True), (1, False)]
    assert len(load("longbench", path, count=5)) == 5
    with pytest.raises(ValueError, match="x.jsonl line 6: expected a JSON object"):
        load("longbench", path)


def test_lines_are_numbered_as_they_stand_and_samples_as_they_come(tmp_path):
    path = write(tmp_path / "x.jsonl", [LONGBENCH, without(LONGBENCH, "context")])
    path.write_text("\n\n" + path.read_text().replace("\n", "\n\n"))
    with pytest.raises(ValueError, match="x.jsonl line 5: expected the field 'context'"):
        load("longbench", path)
    assert load("longbench", path, count=1)[0].index == 0


def test_text_is_utf_8(tmp_path):
    (sample,) = load("longbench", write(tmp_path / "x.jsonl", [{**LONGBENCH, "context": "Größe 北京 …"}]))
    assert sample.context.endswith("Größe 北京 …")


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
        ("ruler", {**RULER, "outputs": ["a", 12]}, r"'outputs', a list of one or more strings, got \['a', 12\]"),
        ("ruler", {**RULER, "input": NEEDLES[NEEDLES.rindex("\nWhat") :]}, "hold a question that begins with"),
        ("ruler", {**RULER, "answer_prefix": 3}, "'answer_prefix', a string, got 3"),
        ("longbench", {**LONGBENCH, "dataset": "qaspere"}, "'dataset', one of narrativeqa, .*got 'qaspere'"),
        ("longbench", {**LONGBENCH, "dataset": "lsht", "all_classes": []}, r"'all_classes', a list of .*, got \[\]"),
        ("longbench", {**LONGBENCH, "context": ["x" * 80]}, r"'context', a string, got \['x{55}\.\.\.$"),
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
    with pytest.raises(FileNotFoundError, match=r"expected a file of JSON lines, got .*none.json, which is none"):
        load("ruler", "none.json")
    with pytest.raises(FileNotFoundError, match=r"expected a file of JSON lines, got .*none, which is none"):
        load("ruler", tmp_path / "none")  # what begins at the root is no name of a data set
    with pytest.raises(ValueError, match="expected a format of ruler, longbench, got 'csv'"):
        load("csv", tmp_path / "none.jsonl")
    path = write(tmp_path / "x.jsonl", [LONGBENCH])
    with pytest.raises(ValueError, match="expected a prompt of hotpotqa with {context}, got 'none'"):
        load("longbench", path, prompts={"hotpotqa": "none"})


@pytest.fixture
def library(monkeypatch):
    """In the place of `datasets`: the requests to it, and what becomes of its errors."""
    requests = []

    def load_dataset(name, configuration, split):
        requests.append((name, configuration, split))
        if name == "no/such":
            raise OSError("not on the hub")
        return there.rows

    there = SimpleNamespace(load_dataset=load_dataset, rows=[LONGBENCH], requests=requests)
    monkeypatch.setitem(sys.modules, "datasets", there)
    return there


def test_data_set_by_name(library, monkeypatch):
    (sample,) = load("longbench", "some/LongBench:hotpotqa", split="validation")
    assert sample.task == "hotpotqa" and sample.expected == ("Ann", "Ann B.")
    load("longbench", "some/LongBench")
    assert library.requests == [("some/LongBench", "hotpotqa", "validation"), ("some/LongBench", None, "test")]
    with pytest.raises(ValueError, match="expected a data set that loads, got 'no/such', split 'test': not on the hub"):
        load("longbench", "no/such")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"package 'datasets' .* pip install 'lkv-ext\[longbench\]'"):
        load("longbench", "some/LongBench")


def test_rows_of_a_data_set(library):
    """A task is named by the configuration; a row is numbered from 0, as the data set does."""
    library.rows = [RULER, RULER, without(RULER, "outputs")]
    assert [(s.task, s.index) for s in load("ruler", "some/ruler:vt", count=2)] == [("vt", 0), ("vt", 1)]
    with pytest.raises(ValueError, match="some/ruler:vt row 2: expected the field 'outputs'"):
        load("ruler", "some/ruler:vt")
    library.rows = []
    with pytest.raises(ValueError, match="expected at least one record, got an empty split 'train'"):
        load("ruler", "some/ruler:vt", split="train")
