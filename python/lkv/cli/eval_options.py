"""The options of `lkv eval`, checked, and the methods that they name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from lkv import tasks
from lkv.cli import models
from lkv.evaluate.methods import FLOOR, FULL, Method, choose, heuristics, learned
from lkv.evaluate.oracle import ORACLES
from lkv.policies.catalog import COMPARED
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import load
from lkv.tasks import files

ALL = "all"  # of `--methods`
METHODS = [FULL, FLOOR, *COMPARED, "lkv"]
TEXT_METHODS = [FULL, *ORACLES, *COMPARED, "lkv"]
GRID = ["uniform+kvzip", "uniform+lkv-t", "lkv-h+snapkv", "lkv-h+kvzip"]
RETENTIONS, TEXT_RETENTIONS = [0.05, 0.1, 0.15, 0.3], [0.05, 0.15, 0.3, 0.5]
WORDINGS = ("trained", "unseen")
WITHOUT_TEXT = ("tasks", "samples", "split", "batch", "file", "format", "prompts", "question_marker", "soft")
WITH_TEXT = ("passages", "facts", "continuation", "wordings", "greedy", "reference", "untrained")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.retentions is None:
        options.retentions = TEXT_RETENTIONS if options.text else RETENTIONS
    for retention in options.retentions:
        if not 0 < retention <= 1:
            raise ValueError(f"lkv eval: expected retentions in (0, 1], got {retention}")
    if options.samples < 1 or options.batch < 1:
        raise ValueError("lkv eval: expected samples and batch >= 1")
    if options.answer_tokens is not None and options.answer_tokens < 1:
        raise ValueError(f"lkv eval: expected answer tokens >= 1, got {options.answer_tokens}")
    for name in ("methods", "retentions", "tasks", "file", "text"):
        # Twice the same would count as twice the samples, and narrow the intervals.
        values = getattr(options, name) or []
        if again := next((value for i, value in enumerate(values) if value in values[:i]), None):
            raise ValueError(f"lkv eval: expected --{name} without repetitions, got {again} more than once")
    if bool(options.file) != bool(options.format):
        given, other = ("--file", "--format") if options.file else ("--format", "--file")
        raise ValueError(f"lkv eval: expected {other} beside {given}, got none")
    if options.soft and (options.file or options.see_question):
        other = "--file" if options.file else "--see-question"
        raise ValueError(f"lkv eval: expected --soft with made texts and a question not seen, got {other} beside it")
    for name in WITHOUT_TEXT if options.text else WITH_TEXT:
        if getattr(options, name) != parser.get_default(name):
            flag, place = name.replace("_", "-"), "without" if options.text else "beside"
            raise ValueError(f"lkv eval: expected --{flag} {place} --text only")
    if options.text:
        _check_text(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lkv eval",
        description="What is left after physical eviction: accuracy on made texts, one question each, or on those of a "
        "benchmark (--file); or facts and continuations of passages of text files (--text).",
    )
    models.add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, help=models.CHECKPOINT)
    parser.add_argument("--any-weights", action="store_true", help="take checkpoints of another fine-tune of the model")
    parser.add_argument("--variants", nargs="*", default=[], metavar="NAME=PATH", help="more checkpoints, as methods")
    parser.add_argument(
        "--methods",
        "--policies",
        nargs="+",
        help=f"default: {' '.join(METHODS)}, with --text {' '.join(TEXT_METHODS)}; and the variants. all: these "
        "and every name of `lkv policies`",
    )
    parser.add_argument("--grid", action="store_true", help=f"add {' '.join(GRID)}")
    parser.add_argument(
        "--retentions", nargs="+", type=float, help=f"default: {RETENTIONS}, with --text {TEXT_RETENTIONS}"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text")
    parser.add_argument(
        "--answer-tokens",
        type=int,
        help="default: 24, of --file what its benchmark has, with --greedy those of the right answer and two",
    )
    parser.add_argument("--see-question", action="store_true", help="compress the question along with the text")
    parser.add_argument("--out", type=Path, help="folder for report.json and the plots; with --text also for results")
    made = parser.add_argument_group("made texts")
    made.add_argument("--tasks", nargs="+", default=list(tasks.RETRIEVAL), choices=list(tasks.TASKS))
    made.add_argument("--samples", type=int, default=300, help="per task")
    made.add_argument("--split", default="test", choices=tasks.SPLITS)
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--soft", action="store_true", help="also answer through the relaxed mask of the training")
    file = parser.add_argument_group("texts of benchmarks")
    file.add_argument("--file", nargs="+", metavar="PATH", help="of JSON lines, or data sets NAME:CONFIGURATION")
    file.add_argument("--format", choices=files.FORMATS, help="of the files; scored by the benchmark's own metrics")
    file.add_argument("--prompts", type=Path, help="LongBench: its dataset2prompt.json; default: our own wording")
    file.add_argument("--question-marker", help="RULER: what questions begin with; default: as its templates do")
    text = parser.add_argument_group("passages of text files")
    text.add_argument(
        "--text",
        nargs="+",
        action="extend",
        metavar="[LABEL=]PATH",
        help="passages of these files, or of all text files in these folders, of those that `lkv train` never reads; "
        "each folder is a domain, of its own name or the label's",
    )
    text.add_argument(
        "--untrained",
        nargs="+",
        default=[],
        metavar="LABEL",
        help="domains nothing was trained on: all files are read",
    )
    text.add_argument("--passages", type=int, default=25, help="per domain; default: %(default)s")
    text.add_argument("--facts", type=int, default=4, help="woven into each passage; default: %(default)s")
    text.add_argument(
        "--continuation",
        type=int,
        default=48,
        help="tokens after each passage; default: %(default)s, none with --see-question",
    )
    text.add_argument("--wordings", choices=WORDINGS, default=WORDINGS[0], help="of the facts; default: %(default)s")
    text.add_argument(
        "--greedy", action="store_true", help="also answer freely, with two tokens more than the right answer"
    )
    text.add_argument(
        "--reference", default="lkv", help="the method that others are compared with; default: %(default)s"
    )
    return parser


def _check_text(options: argparse.Namespace) -> None:
    for name, least in (("passages", 1), ("facts", 0), ("continuation", 0), ("length", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"lkv eval: expected --{name} >= {least}, got {getattr(options, name)}")
    if options.out is None:
        raise ValueError("lkv eval: expected --out beside --text, the folder that an interrupted run goes on in")
    if options.answer_tokens is not None and not options.greedy:
        raise ValueError("lkv eval: expected --answer-tokens beside --greedy only, where there is --text")
    if options.see_question:
        options.continuation = 0  # which no question comes before
    if options.facts == options.continuation == 0:
        raise ValueError("lkv eval: expected --facts or --continuation of more than 0, or there is nothing to judge")


def chosen(options: argparse.Namespace, model: PreTrainedModel) -> tuple[list[Method], Learned | None]:
    """The methods, and LKV if there is a checkpoint."""
    path = models.checkpoint(options)
    policies = heuristics() | (ORACLES if options.text else {})
    given = options.methods or []
    names = TEXT_METHODS if options.text else METHODS
    if ALL in given:
        if given != [ALL]:
            raise ValueError(f"lkv eval: expected --methods {ALL} alone, got {' '.join(given)}")
        given = []
        names = [*names[:-1], *(name for name in policies if name not in names), names[-1]]
    lkv, others = None, variants(options)
    if path is not None:
        lkv = load(path, model, any_weights=options.any_weights)
        more = {name: load(of, model, any_weights=options.any_weights) for name, of in others.items()}
        policies |= learned(lkv, more)
    else:
        names = [name for name in names if name != "lkv"]
    grid = GRID if options.grid and lkv is not None else []
    if absent := [name for name in grid if name not in policies]:
        raise ValueError(
            f"lkv eval: expected beside --grid a checkpoint or a variant with fixed shares, as --budget capped trains "
            f"them, for {', '.join(absent)}, got budgets that depend on the text"
        )
    default = [*names, *grid, *others]
    return choose(given or default, policies), lkv


def variants(options: argparse.Namespace) -> dict[str, str]:
    out = {}
    for text in options.variants:
        name, equals, path = text.partition("=")
        if not equals:
            raise ValueError(f"lkv eval: expected variants NAME=PATH, got {text!r}")
        out[name] = path
    return out
