"""`lkv train`: learns budgets and scores for a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lkv import tasks
from lkv.cli import models
from lkv.evaluate.methods import Method
from lkv.evaluate.run import Setting, by_method, evaluate
from lkv.learn.config import REPLIES, STARTS, TARGETS, TrainConfig
from lkv.learn.forecast import forecast, prefill_seconds, sentence
from lkv.learn.lessons import Recorded
from lkv.learn.recording import Recorder
from lkv.learn.records import Records
from lkv.learn.train import BEST, STATE, Trainer, Validate
from lkv.learn.validation import fidelity
from lkv.models import RETRIEVER
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import Design, load
from lkv.policies.lkv.head_budget import KINDS
from lkv.policies.lkv.token_scorer import INPUTS, SCALES
from lkv.tasks.documents import documents

CHOICES = {"budget": KINDS, "input": INPUTS, "scale": SCALES, "target": TARGETS, "start": STARTS, "replies": REPLIES}


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "lkv train", description="Trains LKV on a frozen model. A run that was interrupted goes on where it was saved."
    )
    models.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; 'best' in it is the checkpoint")
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        metavar="[LABEL=]PATH",
        help="train on passages of these files, or of all text files in these folders; --synthetic mixes texts of "
        "tasks in; each folder is a domain, of its own name or the label's; a tenth of its files is for validation, "
        "15 %% are never read",
    )
    parser.add_argument(
        "--scorer",
        type=Path,
        metavar="CHECKPOINT",
        help="begin with its LKV-T; --warm-steps 0 leaves out the regression",
    )
    parser.add_argument("--records", type=Path, help="folder for what the model reads; default: 'records' in --out")
    known = parser.parse_known_args([x for x in argv if x not in ("-h", "--help")] + ["--out", ""])[0]
    recipe = recipe_for(known.model, bool(known.text))
    for group, values in (("what is trained", recipe.design), ("how", recipe)):
        section = parser.add_argument_group(group)
        for field in fields(values):
            if field.default is not MISSING:
                _add(section, field.name, getattr(values, field.name))
    options = parser.parse_args(argv)
    design = Design(**{f.name: getattr(options, f.name) for f in fields(Design)})
    given: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(TrainConfig) if f.name != "design"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = TrainConfig(design=design, **given)
    model, tokenizer, language = models.load(options)
    scorer = None if options.scorer is None else load(options.scorer, model).token_scorer
    trainer = Trainer(model, tokenizer, language, config, options.out, scorer=scorer)
    if options.text:
        learn_from_texts(trainer, tokenizer, options.text, options.records or options.out / "records")
    else:
        trainer.validate = validation(trainer, tokenizer)
    trainer.run()
    print(f"lkv train: {options.out / BEST}")
    return 0


def recipe_for(model: str, text: bool) -> TrainConfig:
    """The defaults: those that the shipped retriever was trained with, and what is better for models of the world."""
    if model == RETRIEVER and not text:
        return TrainConfig()
    base = TrainConfig(design=Design(scale="absolute"), target="attention", start="joint")
    if not text:
        return base
    # Soft masks to the end: hard ones did not help (docs/real-model.md).
    soft = replace(base, hard=0.0, temperature=(1.0, 0.1), retention=(0.03, 0.4))
    return replace(soft, texts=96, steps=160, warm_steps=300, batch=2, questions=3, validate_every=40, validation=8)


def learn_from_texts(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], folder: Path
) -> None:
    """Makes the records that are missing, and gives the trainer what it learns from and is validated on."""
    config, accelerator = trainer.config, trainer.accelerator
    recorder = Recorder(
        trainer.model,
        tokenizer,
        documents(sources),
        config,
        folder,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    counts = {"train": config.texts, "validation": config.validation}
    if accelerator.is_main_process and not (trainer.folder / STATE).exists():
        left = sum(len(Records(folder, split, count).missing()) for split, count in counts.items())
        middle = round((config.length * (config.longest or config.length)) ** 0.5)
        parts = forecast(config, prefill_seconds(trainer.model, middle), left)
        print(f"lkv train: {sentence(parts)}", file=sys.stderr)
    train, held_out = (recorder.run(split, count) for split, count in counts.items())
    accelerator.wait_for_everyone()
    trainer.lessons = Recorded(trainer.model, trainer.lkv, train, config)
    trainer.validate = fidelity(Recorded(trainer.model, trainer.lkv, held_out, config))


def validation(trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> Validate:
    """Accuracy after physical eviction, per retention, on the validation split."""
    config, source = trainer.config, trainer.source
    samples = [
        tasks.make(task, i, config.length, split="validation", language=source.language, count=source.count)
        for task in config.tasks
        for i in range(config.validation)
    ]
    setting = Setting(retentions=config.validation_retentions, limit=config.answer_tokens)

    def validate(policy: Learned) -> dict[str, float]:
        results = evaluate(trainer.model, tokenizer, samples, [Method("lkv", replace(policy))], setting)
        return {
            f"{retention:g}": sum(r.score for r in group) / len(group)
            for (_, retention), group in by_method(results).items()
        }

    return validate


def _add(section: argparse._ArgumentGroup, name: str, default: object) -> None:
    flag = "--" + name.replace("_", "-")
    if isinstance(default, tuple):
        shown = " ".join(map(str, default))
        section.add_argument(flag, nargs="+", type=type(default[0]), default=default, help=f"default: {shown}")
    else:
        section.add_argument(
            flag, type=type(default), default=default, choices=CHOICES.get(name), help=f"default: {json.dumps(default)}"
        )
