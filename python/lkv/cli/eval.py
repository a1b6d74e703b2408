"""`lkv eval`: methods x retentions x tasks, by physical eviction."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lkv_ext
from lkv import retriever, tasks
from lkv.cli import models
from lkv.evaluate import metrics, report
from lkv.evaluate.kept import kept_positions
from lkv.evaluate.methods import FLOOR, FULL, choose, heuristics, learned
from lkv.evaluate.run import Setting, evaluate
from lkv.evaluate.soft import soft_accuracy
from lkv.models import RETRIEVER
from lkv.policies import POLICIES, Policy
from lkv.policies.lkv import LKV, Learned
from lkv.policies.lkv.checkpoint import load
from lkv.tasks import Language, Sample, files

METHODS = [FULL, FLOOR, *POLICIES, "lkv"]
GRID = ["uniform+kvzip", "uniform+lkv-t", "lkv-h+snapkv", "lkv-h+kvzip"]


def run(argv: Sequence[str]) -> int:
    options = parse(argv)
    model, tokenizer, language = models.load(options)
    policies, lkv = known(options, model)
    names = [*METHODS, *(GRID if options.grid else []), *variants(options)]
    if lkv is None:
        names = [name for name in names if name not in ("lkv", *GRID)]
    methods = choose(options.methods or names, policies)
    setting = Setting(tuple(options.retentions), options.see_question, options.batch, options.answer_tokens or 24)
    samples = load_samples(options) if options.file else make_samples(options, tokenizer, language)
    print(f"question {'seen' if options.see_question else 'not seen'} by the compression; {describe(samples, options)}")
    results = []
    last = methods[-1].name, 1.0 if methods[-1].name == FULL else setting.retentions[-1]
    with tqdm(total=len(samples), desc="lkv eval", unit="sample") as bar:
        for task in dict.fromkeys(s.task for s in samples):
            group = [s for s in samples if s.task == task]
            if isinstance(group[0], files.FileSample):
                setting = replace(setting, limit=options.answer_tokens or group[0].limit, metric=metrics.score)
            for result in evaluate(model, tokenizer, group, methods, setting):
                results.append(result)
                bar.update((result.method, result.retention) == last)
    rows = report.rows(results)
    print(report.table(rows))
    extra: dict[str, Any] = {}
    if lkv is not None and options.out:
        extra = seen(model, tokenizer, lkv, samples[len(samples) // 2], setting.retentions)
    write(options, setting, rows, extra)
    if lkv is not None and options.soft:
        extra["soft_to_hard"] = soft_to_hard(model, tokenizer, samples, lkv, rows, setting)
        write(options, setting, rows, extra)
    return 0


def seen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lkv: Learned,
    sample: Sample,
    retentions: Sequence[float],
) -> dict[str, Any]:
    """What the pictures show beside accuracy: shares of the heads, and what is kept of one text."""
    extra: dict[str, Any] = {"kept_positions": kept_positions(model, tokenizer, lkv, sample, 0.15)}
    if isinstance(lkv, LKV):
        length = extra["kept_positions"]["length"]
        tables = (lkv.table(round(retention * length), length) / length for retention in retentions)
        extra["shares"] = {f"{r:g}": table.tolist() for r, table in zip(retentions, tables, strict=True)}
    return extra


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("lkv eval", description="Accuracy after physical eviction, one question a text.")
    models.add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, help="of LKV; default: the retriever's own")
    parser.add_argument("--variants", nargs="*", default=[], metavar="NAME=PATH", help="more checkpoints, as methods")
    parser.add_argument("--methods", nargs="+", help=f"default: {' '.join(METHODS)} and the variants")
    parser.add_argument("--grid", action="store_true", help=f"add {' '.join(GRID)}")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.RETRIEVAL), choices=list(tasks.TASKS))
    parser.add_argument("--retentions", nargs="+", type=float, default=[0.05, 0.1, 0.15, 0.3])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text")
    parser.add_argument("--samples", type=int, default=300, help="per task")
    parser.add_argument("--split", default="test", choices=tasks.SPLITS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--answer-tokens", type=int, help="default: 24, of files what their benchmark has")
    parser.add_argument("--file", nargs="+", metavar="PATH", help="of JSON lines, or data sets NAME:CONFIGURATION")
    parser.add_argument("--format", choices=files.FORMATS, help="of the files; scored by the benchmark's own metrics")
    parser.add_argument("--prompts", type=Path, help="LongBench: its dataset2prompt.json; default: our own wording")
    parser.add_argument("--question-marker", help="RULER: what questions begin with; default: as its templates do")
    parser.add_argument("--see-question", action="store_true", help="compress the question along with the text")
    parser.add_argument("--soft", action="store_true", help="also answer through the relaxed mask of the training")
    parser.add_argument("--out", type=Path, help="folder for report.json and the plots")
    options = parser.parse_args(argv)
    for retention in options.retentions:
        if not 0 < retention <= 1:
            raise ValueError(f"lkv eval: expected retentions in (0, 1], got {retention}")
    if options.samples < 1 or options.batch < 1:
        raise ValueError("lkv eval: expected samples and batch >= 1")
    if options.answer_tokens is not None and options.answer_tokens < 1:
        raise ValueError(f"lkv eval: expected answer tokens >= 1, got {options.answer_tokens}")
    for name in ("methods", "retentions", "tasks", "file"):
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
    return options


def known(options: argparse.Namespace, model: PreTrainedModel) -> tuple[Mapping[str, Policy], Learned | None]:
    """All methods by name, and LKV if there is a checkpoint."""
    path = options.checkpoint
    if path is None and options.model == RETRIEVER and retriever.LKV.exists():
        path = retriever.LKV
    policies = heuristics()
    if path is None:
        return policies, None
    lkv = load(path, model)
    return policies | learned(lkv, {name: load(of, model) for name, of in variants(options).items()}), lkv


def variants(options: argparse.Namespace) -> dict[str, str]:
    out = {}
    for text in options.variants:
        name, equals, path = text.partition("=")
        if not equals:
            raise ValueError(f"lkv eval: expected variants NAME=PATH, got {text!r}")
        out[name] = path
    return out


def make_samples(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, language: Language) -> list[Sample]:
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return [
        tasks.make(task, i, options.length, split=options.split, language=language, count=count)
        for task in options.tasks
        for i in range(options.samples)
    ]


def load_samples(options: argparse.Namespace) -> list[files.FileSample]:
    """The first `--samples` of every file."""
    prompts = None
    if options.prompts is not None:
        prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
        if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
            raise ValueError(f"lkv eval: expected prompts by subset, a JSON object of strings, in {options.prompts}")
    more = {"count": options.samples, "split": options.split, "prompts": prompts, "marker": options.question_marker}
    samples = [sample for source in options.file for sample in files.load(options.format, source, **more)]
    metrics.check_packages(samples)
    return samples


def soft_to_hard(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    lkv: Learned,
    rows: Sequence[report.Row],
    setting: Setting,
) -> dict[str, list[float]]:
    """Accuracy through the relaxed mask and after physical eviction, per retention."""
    out = {}
    for row in rows:
        if row["method"] == "lkv":
            retention = row["retention"]
            soft = soft_accuracy(model, tokenizer, samples, lkv, retention, setting.batch, setting.limit)
            out[f"{retention:g}"] = [soft, row["score"]]
            print(
                f"at {retention:g}: {100 * soft:.1f} through the relaxed mask, {100 * row['score']:.1f} after eviction"
            )
    return out


def describe(samples: Sequence[Sample], options: argparse.Namespace) -> str:
    if options.file:
        wording = ", prompts in our own wording" if options.format == "longbench" and not options.prompts else ""
        return f"{len(samples)} texts of {', '.join(options.file)}{wording}"
    evidence = max(s.evidence_tokens for s in samples)
    return f"{len(samples)} texts of {options.length} tokens, evidence of at most {evidence}"


def write(options: argparse.Namespace, setting: Setting, rows: list[report.Row], extra: dict[str, Any]) -> None:
    """report.json and the pictures, where a folder was named."""
    if options.out is None:
        return
    from lkv.evaluate.plots import draw

    facts = {
        "model": options.model,
        "tasks": options.file or options.tasks,
        "format": options.format,
        "prompts": str(options.prompts) if options.prompts else None,
        "split": options.split,
        "length": None if options.file else options.length,
        "samples": options.samples,
        "question_seen": setting.see_question,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lkv_ext": lkv_ext.build_info()["version"],
        "device": options.device,
        "threads": torch.get_num_threads(),
    }
    report.write(options.out / "report.json", facts, rows, extra)
    for path in draw({"rows": rows, **extra}, options.out):
        print(path)
