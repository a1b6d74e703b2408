"""`lkv eval --text`: methods x retentions on passages of text files. An interrupted run goes on where it was."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import add
from statistics import fmean
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lkv_ext
from lkv.cli import models
from lkv.cli.eval_options import chosen
from lkv.evaluate import report, text_report
from lkv.evaluate.forecast import clock, forecast
from lkv.evaluate.forks import policy_of
from lkv.evaluate.methods import FLOOR, FULL, Method
from lkv.evaluate.results import Cell, Key, Results
from lkv.evaluate.texts import Judge
from lkv.learn.dialogue import Exchange, exchange
from lkv.learn.forecast import sentence
from lkv.learn.recording import fingerprints
from lkv.tasks.documents import Document, documents
from lkv.tasks.facts import TRAINED, UNSEEN
from lkv.tasks.passages import Passage, passage
from lkv.text import check_fits, check_known

FORMAT = 1
SETTINGS = ("length", "facts", "continuation", "see_question", "greedy", "answer_tokens")
WORDINGS = {"trained": TRAINED, "unseen": UNSEEN}


def run(options: argparse.Namespace) -> int:
    found = read_documents(options.text, options.untrained)
    if any(document.domain == text_report.ALL for document in found):
        raise ValueError(f"lkv eval: expected no domain of the name {text_report.ALL!r}; --text LABEL=PATH gives one")
    model, tokenizer, _ = models.load(options)
    methods, _ = chosen(options, model)
    texts = Texts(options, tokenizer, found)
    made_with, known = manifest(options, model, tokenizer, found), {m.name: m.identity for m in methods}
    results = Results(options.out, Cell, made_with, known)
    keys = [(i, m.name, r) for i in range(texts.count) for m in methods for r in m.retentions(options.retentions)]
    missing = results.missing(keys)
    by_passage: dict[int, list[Key]] = {}
    for key in missing:
        by_passage.setdefault(key[0], []).append(key)
    talks = {i: texts.talk(i) for i in tqdm(by_passage, desc="lkv eval: texts", disable=not by_passage, leave=False)}
    check(model, methods, options.retentions, list(talks.values()))
    named = {m.name: m for m in methods}
    todo = {i: [(named[name], retention) for _, name, retention in part] for i, part in by_passage.items()}
    how = {"see_question": options.see_question, "greedy": options.greedy}
    judge = Judge(model, tokenizer, methods, limit=options.answer_tokens, **how)
    if missing:
        each = {i: [method for method, _ in part] for i, part in todo.items()}
        taken = clock(judge, next(iter(talks.values())), fmean(options.retentions))
        parts = forecast(each, taken, options.facts, **how)
        print(f"lkv eval: {len(missing)} results on {len(todo)} passages, {sentence(parts)}", file=sys.stderr)
    with tqdm(total=len(missing), desc="lkv eval", unit="result", disable=not missing) as bar:
        for i, part in todo.items():
            for cell in judge.cells(i, texts.passage(i), talks[i], part):
                results.add(cell)
                bar.update()
    finish(options, results, texts.count)
    return 0


def read_documents(sources: Sequence[str], untrained: Sequence[str]) -> list[Document]:
    """All files; those of domains that nothing was trained on are for tests.

    Raises:
        ValueError: for a name that is none of a domain.
    """
    found = documents(sources)
    domains = sorted({x.domain for x in found})
    if unknown := [name for name in untrained if name not in domains]:
        raise ValueError(f"lkv eval: expected --untrained domains of {', '.join(domains)}, got {', '.join(unknown)}")
    return [replace(x, split="test") if x.domain in untrained else x for x in found]


@dataclass(frozen=True)
class Texts:
    """Passages of the test split, by their number; domains take turns."""

    options: argparse.Namespace
    tokenizer: PreTrainedTokenizerBase
    documents: Sequence[Document]

    @property
    def count(self) -> int:
        return self.options.passages * len({x.domain for x in self.documents})

    def passage(self, index: int) -> Passage:
        """Raises ValueError where no file is long enough."""
        options = self.options
        return passage(
            self.documents,
            index,
            options.length,
            lambda text: len(self.tokenizer(text, add_special_tokens=False).input_ids),
            split="test",
            facts=options.facts,
            continuation=options.continuation,
            wordings=WORDINGS[options.wordings],
        )

    def talk(self, index: int) -> Exchange:
        """Raises ValueError for a text that the tokenizer does not know."""
        text, more = self.passage(index), self.options.continuation
        talk = exchange(self.tokenizer, text, more + 1 if more else 0)
        check_known(self.tokenizer, talk.context, text.document, "lkv eval")
        return talk


def manifest(
    options: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: Sequence[Document],
) -> dict[str, object]:
    """What all results depend on, apart from the methods."""
    return {
        "format": FORMAT,
        "dtype": str(model.dtype),
        **fingerprints(model, tokenizer),
        "documents": [[x.domain, x.name, x.digest] for x in found if x.split == "test"],
        "wordings": hashlib.sha256(repr(WORDINGS[options.wordings]).encode()).hexdigest()[:16],
        **{name: getattr(options, name) for name in SETTINGS},
    }


def check(model: PreTrainedModel, methods: Sequence[Method], given: Sequence[float], talks: Sequence[Exchange]) -> None:
    """
    Raises:
        ValueError: for a method that protects more rows than it may keep of a text, and for texts that are longer than
            what the model reads.
    """
    if not talks:
        return
    shortest = min(talks, key=lambda talk: len(talk.context))
    rows = round(min(given) * len(shortest.context))
    for method in methods:
        policy = policy_of(method, shortest.protected)
        if method.name not in (FULL, FLOOR) and policy is not None and policy.sink + policy.window > rows:
            raise ValueError(
                f"lkv eval: expected texts and retentions of which more is kept than what is protected, got "
                f"{rows} rows, {min(given):g} of {len(shortest.context)} tokens, for {method.name}, which protects "
                f"{policy.sink + policy.window}; choose a larger --length, larger --retentions or other --methods"
            )
    ends = [[*map(add, talk.questions, talk.answers), talk.continuation] for talk in talks]
    longest = max(len(talk.context) + max(map(len, after)) for talk, after in zip(talks, ends, strict=True))
    check_fits(model, longest, "lkv eval")


def finish(options: argparse.Namespace, results: Results[Cell], count: int) -> None:
    """report.json and tables of all methods that have all passages, those of earlier runs included."""
    cells = [x for x in results.cells.values() if x.passage < count]
    numbers: dict[tuple[str, float], int] = {}
    for cell in cells:
        numbers[cell.method, cell.retention] = numbers.get((cell.method, cell.retention), 0) + 1
    complete = [x for x in cells if numbers[x.method, x.retention] == count]
    rows = text_report.rows(complete, options.reference)
    facts: dict[str, Any] = {
        "model": options.model,
        "domains": sorted({cell.domain for cell in cells}),
        "untrained": options.untrained,
        "passages": count,
        "wordings": options.wordings,
        **{name: getattr(options, name) for name in SETTINGS},
        "reference": options.reference,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lkv_ext": lkv_ext.build_info()["version"],
        "device": options.device,
        "threads": torch.get_num_threads(),
    }
    extra = {"shares": text_report.shares(complete)}
    report.write(options.out / "report.json", facts, rows, extra)
    seen = "seen" if options.see_question else "not seen"
    print(f"question {seen} by the compression; {count} passages of {options.length} tokens\n")
    print(text_report.tables(rows, options.reference))
    from lkv.evaluate.plots import draw_texts

    for path in draw_texts({"rows": rows, **extra}, options.out, options.reference):
        print(path)
