"""`lkv eval`: methods x retentions x tasks, by physical eviction. Passages of text files: see `lkv.cli.eval_texts`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lkv_ext
from lkv import tasks
from lkv.cli import models
from lkv.cli.eval_options import chosen, parse
from lkv.evaluate import metrics, report
from lkv.evaluate.kept import kept_positions
from lkv.evaluate.methods import Method
from lkv.evaluate.results import Results
from lkv.evaluate.run import Result, Setting, digest, evaluate
from lkv.evaluate.soft import soft_accuracy
from lkv.learn.recording import fingerprints
from lkv.policies.lkv import LKV, Learned
from lkv.tasks import Language, Sample, files
from lkv.text import check_fits, encode

FORMAT = 1  # of results


def run(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.text:
        from lkv.cli import eval_texts

        return eval_texts.run(options)
    model, tokenizer, language = models.load(options)
    methods, lkv = chosen(options, model)
    setting = Setting(tuple(options.retentions), options.see_question, options.batch, options.answer_tokens or 24)
    samples = load_samples(options) if options.file else make_samples(options, tokenizer, language)
    print(f"question {'seen' if options.see_question else 'not seen'} by the compression; {describe(samples, options)}")
    for sample in samples:
        limit = options.answer_tokens or (sample.limit if isinstance(sample, files.FileSample) else setting.limit)
        length = len(encode(tokenizer, sample.context, begins=True)) + len(encode(tokenizer, sample.question))
        check_fits(model, length + limit, "lkv eval", f"{sample.task} {sample.index}")
    kept = None
    if options.out:
        known = {method.name: method.identity for method in methods}
        kept = Results(options.out, Result, manifest(options, setting, model, tokenizer), known)
    results: list[Result] = []
    with tqdm(total=len(samples), desc="lkv eval", unit="sample") as bar:
        for task in dict.fromkeys(s.task for s in samples):
            group = [s for s in samples if s.task == task]
            if isinstance(group[0], files.FileSample):
                setting = replace(setting, limit=options.answer_tokens or group[0].limit, metric=metrics.score)
            for result in answered(model, tokenizer, group, methods, setting, kept, bar):
                results.append(result)
            if kept is not None:
                write(options, setting, report.rows(results), {})
    rows = report.rows(results)
    print(report.table(rows))
    extra: dict[str, Any] = {}
    if lkv is not None and options.out:
        extra = seen(model, tokenizer, lkv, samples[len(samples) // 2], setting.retentions)
    write(options, setting, rows, extra)
    if lkv is not None and options.soft:
        extra["soft_to_hard"] = soft_to_hard(model, tokenizer, samples, lkv, rows, setting)
        write(options, setting, rows, extra)
    if options.out is not None:
        from lkv.evaluate.plots import draw

        for path in draw({"rows": rows, **extra}, options.out):
            print(path)
    return 0


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    setting: Setting,
    kept: Results[Result] | None,
    bar: tqdm,
) -> list[Result]:
    """Results of all methods on these samples; those that are kept are not computed again, and new ones are kept."""
    wanted = [(m, r) for m in methods for r in m.retentions(setting.retentions)]
    there = {} if kept is None else kept.cells
    lacking = [s for s in samples if any((digest(s), m.name, r) not in there for m, r in wanted)]
    run = [m for m in methods if any((digest(s), n.name, r) not in there for s in lacking for n, r in wanted if n is m)]
    bar.update(len(samples) - len(lacking))
    found: dict[tuple, Result] = {}
    last = [(run[-1].name, r) for r in run[-1].retentions(setting.retentions)][-1] if run else None
    for result in evaluate(model, tokenizer, lacking, run, setting):
        found[result.key] = result
        if kept is not None and result.key not in there:
            kept.add(result)
        bar.update((result.method, result.retention) == last)
    found = {**found, **there}
    return [found[digest(s), m.name, r] for m, r in wanted for s in samples]


def manifest(
    options: argparse.Namespace, setting: Setting, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, object]:
    """What results depend on beside samples, which have a digest each, and methods."""
    return {
        "format": FORMAT,
        "dtype": str(model.dtype),
        **fingerprints(model, tokenizer),
        "question_seen": setting.see_question,
        "answer_tokens": options.answer_tokens,
    }


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
    """report.json, where a folder was named."""
    if options.out is None:
        return
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
