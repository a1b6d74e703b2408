"""The retriever: texts in which a few facts stand among filler and decoys, many of them in little time.

It reads them without knowing the questions, `lkv_ext` evicts its cache, and it answers from what is left: as LKV has
learned to keep it, as two heuristics keep it, and from the whole cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import tasks
from lkv.demo.machine import describe
from lkv.evaluate import report
from lkv.evaluate.kept import kept_positions
from lkv.evaluate.methods import FULL, Method, heuristics
from lkv.evaluate.run import Result, Setting, evaluate
from lkv.policies.lkv import LKV, Learned

HEURISTICS = ("snapkv", "streaming_llm")


def show(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lkv: Learned | None, options: argparse.Namespace
) -> None:
    assert lkv is not None  # the package has a checkpoint for it
    known = heuristics()
    methods = [Method(FULL, None), Method("lkv", lkv), *(Method(name, known[name]) for name in HEURISTICS)]
    samples = [
        tasks.make(task, i, options.tokens, split="validation")
        for i in range(options.samples)
        for task in tasks.RETRIEVAL
    ]
    print(describe(model, "retriever"))
    print(f"texts of {options.tokens} tokens; the question comes after the eviction")
    setting = Setting(retentions=(options.retention,), batch=1 if options.samples < 2 else 8)
    results: list[Result] = []
    for task in tqdm(tasks.RETRIEVAL, desc="reading, evicting, answering", unit="task"):
        results += evaluate(model, tokenizer, [s for s in samples if s.task == task], methods, setting)
    print(example(results, samples, model))
    rows = report.rows(results)
    print(report.table(rows))
    print(f"pictures: {', '.join(map(str, pictures(model, tokenizer, lkv, samples, rows, options)))}")


def example(results: Sequence[Result], samples: Sequence[tasks.Sample], model: PreTrainedModel) -> str:
    """One question, and what each method answers from how many bytes of keys and values."""
    sample = next(s for s in samples if s.task == "multi_query")
    config = model.config
    row = 2 * config.head_dim * model.dtype.itemsize
    whole = config.num_hidden_layers * config.num_key_value_heads * (len(sample.context.split()) + 1) * row
    lines = [f"\n... {' '.join(sample.context.split()[-24:])}", f"{sample.question} {sample.answer}"]
    for result in results:
        if (result.task, result.index) == (sample.task, sample.index):
            right = "right" if result.score == 1 else f"{result.score:.0%} right"
            size = f"{result.kept * whole / 1024:6.0f} KiB"
            lines.append(f"  {result.method:10} {size} of keys and values: {result.text:36} {right}")
    return "\n".join([*lines, ""])


def pictures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lkv: Learned,
    samples: Sequence[tasks.Sample],
    rows: Sequence[report.Row],
    options: argparse.Namespace,
) -> list[Path]:
    from lkv.evaluate.plots import draw

    sample = next(s for s in samples if s.task == "multi_query")
    extra: dict[str, Any] = {"kept_positions": kept_positions(model, tokenizer, lkv, sample, options.retention)}
    if isinstance(lkv, LKV):  # else budgets depend on the text
        table = lkv.table(round(options.retention * options.tokens), options.tokens)
        extra["shares"] = {f"{options.retention:g}": (table / options.tokens).tolist()}
    return draw({"rows": rows, **extra}, options.out)
