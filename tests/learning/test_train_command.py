"""`lkv train`: options become the configuration of the run, and what is validated are texts of the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import cli, retriever, tasks
from lkv.cli import train as command
from lkv.evaluate.methods import Method
from lkv.evaluate.run import Result, Setting
from lkv.learn.config import TrainConfig
from lkv.learn.source import Source
from lkv.policies.lkv import LKV, Learned
from lkv.policies.lkv.checkpoint import Design


class Trainer:
    """Takes the options of the command, and trains nothing."""

    made: Trainer

    def __init__(
        self, model: object, tokenizer: object, language: object, config: TrainConfig, folder: Path, *, scorer: object
    ) -> None:
        self.model, self.config, self.folder, self.scorer, self.ran = model, config, folder, scorer, 0
        self.source = Source(config, tokenizer, language)
        Trainer.made = self

    def run(self) -> None:
        self.ran += 1
        assert self.validate is not None


@pytest.fixture
def trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> object:
    monkeypatch.setattr(retriever, "load", lambda: (model, tokenizer))
    monkeypatch.setattr(command, "Trainer", Trainer)

    def call(*options: object) -> Trainer:
        assert cli.main(["train", "--out", str(tmp_path / "run"), *map(str, options)]) == 0
        assert Trainer.made.ran == 1 and Trainer.made.folder == tmp_path / "run"
        return Trainer.made

    return call


def test_by_default_the_configuration_is_its_own(trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = trained()
    assert made.config == TrainConfig() and made.scorer is None
    assert capsys.readouterr().out == f"lkv train: {tmp_path / 'run' / 'best'}\n"


def test_every_option_is_a_field(trained) -> None:
    design = {"budget": "threshold", "floor": 0.01, "input": "hidden", "hidden": 16, "sink": 1, "window": 2}
    design["scale"] = "absolute"
    given = {
        "tasks": ("single", "key_value"), "steps": 3, "warm_steps": 1, "batch": 6, "accumulate": 2, "questions": 5,
        "length": 90, "retention": (0.1, 0.2), "temperature": (0.9, 0.1), "hard": 0.5, "lr_budget": 0.3,
        "lr_scorer": 0.4, "answer_tokens": 7, "validate_every": 8, "validation": 9,
        "validation_retentions": (0.25, 0.5, 0.75), "seed": 11, "target": "both", "start": "joint", "texts": 13,
        "facts": 14, "continuation": 15,
    }  # fmt: skip
    options = []
    for name, value in {**design, **given}.items():
        options += ["--" + name.replace("_", "-"), *(value if isinstance(value, tuple) else [value])]
    config = trained(*options).config
    assert config == TrainConfig(design=Design(**design), **given)
    defaults = TrainConfig()
    assert all(getattr(config, name) != getattr(defaults, name) for name in given)


@pytest.mark.parametrize(
    "options",
    [["--budget", "best"], ["--input", "queries"], ["--steps", "many"], ["--target", "queries"], ["--scale", "log"]],
)
def test_options_of_another_kind_are_refused(trained, options: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        trained(*options)
    assert stopped.value.code == 2 and f"argument {options[0]}: invalid" in capsys.readouterr().err


def test_validation_is_on_the_validation_split(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: tasks.Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many texts per task as the configuration has; per retention, the mean score over all of them."""
    requests = []

    def evaluate(
        model: object, tokenizer: object, samples: list[tasks.Sample], methods: Sequence[Method], setting: Setting
    ) -> list[Result]:
        requests.append((samples, methods, setting))
        return [
            Result(s.task, s.index, methods[0].name, r, r * (s.index + 1), r, "", 0.0)
            for r in setting.retentions
            for s in samples
        ]

    monkeypatch.setattr(command, "evaluate", evaluate)
    config = TrainConfig(
        tasks=("single", "multi_key"), length=100, validation=3, validation_retentions=(0.05, 0.3), answer_tokens=6
    )
    source = Source(config, tokenizer, words)
    validate = command.validation(SimpleNamespace(config=config, source=source, model=model), tokenizer)
    policy = LKV(object(), object(), 1, 2)
    assert validate(policy) == {"0.05": pytest.approx(0.05 * 2), "0.3": pytest.approx(0.3 * 2)}

    ((samples, methods, setting),) = requests
    assert samples == [tasks.make(task, i, 100, split="validation") for task in config.tasks for i in range(3)]
    for task in config.tasks:
        others = [tasks.make(task, i, 100, split=split).context for split in ("train", "test") for i in range(3)]
        assert not {s.context for s in samples} & set(others)
    assert (tuple(setting.retentions), setting.limit, setting.see_question) == ((0.05, 0.3), 6, False)
    (method,) = methods
    assert isinstance(method.policy, Learned) and method.policy == policy


def test_validation_counts_tokens_as_the_model_does(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the language of the run and with its tokenizer."""
    seen = []
    monkeypatch.setattr(command.tasks, "make", lambda *args, **more: seen.append((args, more)))
    config = TrainConfig(tasks=("single",), length=100, validation=1)
    source = Source(config, tokenizer, tasks.English())
    command.validation(SimpleNamespace(config=config, source=source, model=model), tokenizer)
    assert seen == [(("single", 0, 100), {"split": "validation", "language": source.language, "count": source.count})]
