"""`lkv train`: learns budgets and scores for a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lkv import tasks
from lkv.cli import models
from lkv.evaluate.methods import Method
from lkv.evaluate.run import Setting, by_method, evaluate
from lkv.learn.config import TrainConfig
from lkv.learn.train import BEST, Trainer, Validate
from lkv.policies.lkv import Learned
from lkv.policies.lkv.checkpoint import Design
from lkv.policies.lkv.head_budget import KINDS
from lkv.policies.lkv.token_scorer import INPUTS, SCALES

CHOICES = {"budget": KINDS, "input": INPUTS, "scale": SCALES}


def run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "lkv train", description="Trains LKV on a frozen model. A run that was interrupted goes on where it was saved."
    )
    models.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; 'best' in it is the checkpoint")
    for group, of in (("what is trained", Design), ("how", TrainConfig)):
        section = parser.add_argument_group(group)
        for field in fields(of):
            if field.default is not MISSING:
                _add(section, field.name, field.default)
    options = parser.parse_args(argv)
    design = Design(**{f.name: getattr(options, f.name) for f in fields(Design)})
    given: dict[str, Any] = {f.name: getattr(options, f.name) for f in fields(TrainConfig) if f.name != "design"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = TrainConfig(design=design, **given)
    model, tokenizer, language = models.load(options)
    trainer = Trainer(model, tokenizer, language, config, options.out)
    trainer.validate = validation(trainer, tokenizer)
    trainer.run()
    print(f"lkv train: {options.out / BEST}")
    return 0


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
