"""Samples out of files of RULER (arXiv 2404.06654) and LongBench (arXiv 2308.14508).

    samples = load("longbench", "qasper.jsonl")
    samples = load("ruler", "niah_single_1/validation.jsonl")

The context is what an eviction compresses, the question comes after it. Both benchmarks' answers are scored by
`lkv.evaluate.metrics.score`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lkv.tasks import longbench
from lkv.tasks.records import Record, read
from lkv.tasks.scene import Sample

FORMATS = ("ruler", "longbench")
# Where RULER's templates begin to ask, in all of their tasks.
MARKERS = ("\nQuestion: ", "\nWhat ")
# RULER's numbers of answer tokens (scripts/data/synthetic/constants.py), by the beginning of a task's name.
RULER_LIMITS = {"niah": 128, "vt": 30, "variable": 30, "cwe": 120, "common": 120, "fwe": 50, "freq": 50, "qa": 32}


@dataclass(frozen=True, slots=True)
class FileSample(Sample):
    """A sample that a file holds.

    Attributes:
        index: the record's place in its file, from 0; the records' own numbers are not unique everywhere.
        format: "ruler" or "longbench". classes: that an answer may have, for LongBench's classification.
        limit: tokens of an answer, as the benchmark has it.
    """

    format: str
    classes: tuple[str, ...]
    limit: int


def load(
    format: str,
    source: str | Path,
    *,
    count: int | None = None,
    split: str = "test",
    prompts: Mapping[str, str] | None = None,
    marker: str | None = None,
) -> list[FileSample]:
    """
    Args:
        format: "ruler" or "longbench".
        source: a file of JSON lines, or "owner/name:configuration" for the `datasets` library.
        count: read the first ones only.
        split: of a data set.
        prompts: LongBench: texts with {context} and {input} by subset, in the form of its `dataset2prompt.json`;
            default: `lkv.tasks.longbench.PROMPTS`, in our own words.
        marker: RULER: what the question begins with; its last occurrence counts. Default: the later one of `MARKERS`.

    Raises:
        ValueError: for another format, a file that is empty or not JSON, missing fields, and a text without a question.
        FileNotFoundError, MissingPackage: see `lkv.tasks.records.read`.
    """
    if format not in FORMATS:
        raise ValueError(f"lkv.tasks: expected a format of {', '.join(FORMATS)}, got {format!r}")
    records = enumerate(islice(read(source, split), count))
    if format == "ruler":
        return [_ruler(record, i, _name(source), marker) for i, record in records]
    return [_longbench(record, i, _name(source), prompts) for i, record in records]


def _name(source: str | Path) -> str:
    """A task's name: RULER writes `niah_single_1/validation.jsonl`, LongBench `qasper.jsonl`."""
    path = Path(source)
    stem = path.stem if path.suffix else path.name.rpartition(":")[2]
    return path.parent.name if stem in ("validation", "test") and path.parent.name else stem


def _ruler(record: Record, index: int, name: str, marker: str | None) -> FileSample:
    """RULER's fields: input, outputs, index, length; since 2025 answer_prefix, which ends the prompt. A record may have
    `context` and `question` in the place of `input`, `answer` in that of `outputs`, and `task`, as kvpress' copy has.
    """
    task = record.text("task", name)
    if "context" in record.fields:
        context, question = record.text("context"), record.text("question")
    else:
        context, question = _split(record, marker)
    expected = record.texts("answer") if "answer" in record.fields else record.texts("outputs")
    question += record.text("answer_prefix", "")
    limit = next((limit for start, limit in RULER_LIMITS.items() if task.startswith(start)), 128)
    return FileSample(task, index, context, question, " ".join(expected), expected, (), 0, "ruler", (), limit)


def _split(record: Record, marker: str | None) -> tuple[str, str]:
    """A prompt in front of its question, and from there on."""
    text = record.text("input")
    markers = MARKERS if marker is None else (marker,)
    place = max(text.rfind(m) for m in markers)
    if place <= 0:
        shown = " or ".join(map(repr, markers))
        raise ValueError(
            f"lkv.tasks: {record.place}: expected the field 'input' to hold a question that begins with {shown}, "
            f"got one that ends with {text[-40:]!r}"
        )
    return text[:place], text[place:]


def _longbench(record: Record, index: int, name: str, prompts: Mapping[str, str] | None) -> FileSample:
    """LongBench's fields: input, context, answers, length, dataset, language, all_classes, _id."""
    task = record.text("dataset", name)
    subset = task.removesuffix("_e")  # LongBench-E has the prompts and metrics of LongBench
    table = longbench.PROMPTS if prompts is None else prompts
    if subset not in table or subset not in longbench.LIMITS:
        raise ValueError(
            f"lkv.tasks: {record.place}: expected the field 'dataset', one of "
            f"{', '.join(s for s in longbench.LIMITS if s in table)}, got {task!r}"
        )
    before, there, after = table[subset].partition("{context}")
    if not there:
        raise ValueError(f"lkv.tasks: expected a prompt of {subset} with {{context}}, got {table[subset][:60]!r}")
    context = before + record.text("context")
    question = after.replace("{input}", record.text("input"))
    expected, classes = record.texts("answers"), record.texts("all_classes", ())
    if subset in longbench.CLASSIFIED and not classes:
        raise record.error("all_classes", "a list of one or more strings")
    limit = longbench.LIMITS[subset]
    return FileSample(task, index, context, question, expected[0], expected, (), 0, "longbench", classes, limit)
