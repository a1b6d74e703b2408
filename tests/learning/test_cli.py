"""The `lkv` command from end to end, on a tiny model in the retriever's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lkv
from lkv import retriever
from lkv.cli import main
from lkv.policies.lkv import packaged

TRAIN = "train --steps 2 --warm-steps 1 --batch 2 --questions 1 --length 96 --answer-tokens 3 --tasks single multi_key"
EVAL = "eval --samples 2 --length 96 --batch 2 --answer-tokens 3 --retentions 0.3 0.6 --tasks single multi_key"


@pytest.fixture(autouse=True)
def stand_in(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    load = retriever.load
    monkeypatch.setattr(retriever, "load", lambda: load(tmp_path / "model"))
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "none")


def run(text: str, *more: object) -> int:
    return main([*text.split(), *map(str, more)])


def test_train_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = ["--hidden", 8, "--validate-every", 1, "--validation", 1]
    assert run(TRAIN, *small, "--out", tmp_path / "run") == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"validation/0.05", "validation/0.15"} <= metrics[-1].keys()
    assert run(TRAIN, *small, "--budget", "threshold", "--out", tmp_path / "threshold") == 0
    capsys.readouterr()

    variant = f"threshold={tmp_path / 'threshold' / 'best'}"
    options = [
        "--checkpoint",
        tmp_path / "run" / "best",
        "--grid",
        "--soft",
        "--variants",
        variant,
        "--out",
        tmp_path / "report",
    ]
    assert run(EVAL, *options) == 0
    printed = capsys.readouterr().out
    assert "question not seen by the compression; 4 texts of 96 tokens" in printed
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    methods = {row["method"] for row in report["rows"]}
    assert {"full", "floor", "random", "streaming_llm", "snapkv", "adakv", "kvzip", "lkv", "lkv-h+kvzip"} <= methods
    assert {"uniform+kvzip", "uniform+lkv-t", "threshold"} <= methods
    assert report["facts"]["question_seen"] is False
    assert report["soft_to_hard"].keys() == {"0.3", "0.6"}
    assert all((tmp_path / "report" / f"{name}.png").exists() for name in ("accuracy", "budgets", "kept"))


def test_without_a_checkpoint_only_heuristics(capsys: pytest.CaptureFixture) -> None:
    assert run(EVAL, "--see-question") == 0
    printed = capsys.readouterr().out
    assert "question seen by the compression" in printed
    assert "\n| kvzip" in printed and "\n| lkv " not in printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{EVAL} --retentions 0", "lkv eval: expected retentions in (0, 1], got 0.0"),
        (f"{EVAL} --methods h3o", "expected methods of full, floor"),
        (f"{EVAL} --checkpoint /nowhere", "expected lkv.json and lkv.safetensors in /nowhere"),
        (f"{EVAL} --variants x", "expected variants NAME=PATH"),
        (f"{EVAL} --length 5", "expected a context of at least"),
        (f"{TRAIN} --retention 0.5 0.1 --out x", "expected retention 0 < low <= high <= 1"),
        (f"{TRAIN} --length 10 --out x", "a length above the 12 protected tokens"),
    ],
)
def test_wrong_options_are_named(command: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert run(command) == 2
    assert message in capsys.readouterr().err


def test_a_task_that_there_is_not(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("eval --tasks single summing")
    assert stopped.value.code == 2 and "invalid choice: 'summing'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["models", "policies"])
def test_modules_are_attributes_of_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not they were imported by somebody else."""
    module = getattr(lkv, name)
    monkeypatch.delattr(lkv, name)
    assert getattr(lkv, name) is module is sys.modules[f"lkv.{name}"]


def test_command_line_of_the_process_is_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["lkv", "eval", "--samples", "0"])
    assert main() == 2
    assert capsys.readouterr().err == "lkv eval: expected samples and batch >= 1\n"
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate"])
    assert stopped.value.code == 2


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name in ("lkv.cli.train", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("lkv.cli.train", raising=False)
    assert run("train --out x") == 2
    assert "it needs: pip install 'lkv-ext[lkv]'" in capsys.readouterr().err


def test_help_of_every_command(capsys: pytest.CaptureFixture) -> None:
    for command in ("train", "eval", "lm-eval"):
        with pytest.raises(SystemExit) as stopped:
            run(f"{command} --help")
        assert stopped.value.code == 0
    assert "--lr-budget" in capsys.readouterr().out
