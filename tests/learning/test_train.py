"""Training runs: resumed bit for bit, the same in two processes, refused where they cannot be right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.learn import checkpoint
from lkv.learn.checkpoint import Design, Shape
from lkv.learn.config import TrainConfig
from lkv.learn.train import BEST, LAST, METRICS, STATE, Trainer
from lkv.policies.lkv import Learned
from lkv.tasks import Words

CONFIG = TrainConfig(
    design=Design(hidden=8), tasks=("single", "multi_key"), steps=6, warm_steps=2, batch=2, questions=2, length=96,
    answer_tokens=4, validate_every=3, retention=(0.3, 0.6),
)  # fmt: skip


def trainer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **changes: object) -> Trainer:
    return Trainer(model, tokenizer, Words(), replace(CONFIG, **changes), folder)


def same(first: Learned, second: Learned, **tolerance: float) -> None:
    a, b = checkpoint.weights(first), checkpoint.weights(second)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or dict(rtol=0, atol=0)), msg=name)


def test_a_run_learns_logs_and_leaves_checkpoints(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run = trainer(model, tokenizer, tmp_path)
    before = {name: t.clone() for name, t in checkpoint.weights(run.lkv).items()}
    run.run()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [-1, 0, 1, 2, 3, 4, 5, 6]
    assert all("warm" in line for line in lines[:2])
    assert all({"loss", "retention", "fidelity", "temperature"} <= line.keys() for line in lines[2:])
    assert [line["hard"] for line in lines[2:]] == [0, 0, 0, 0, 1, 1]
    changed = [name for name, t in checkpoint.weights(run.lkv).items() if not torch.equal(t, before[name])]
    assert any(name.startswith("scorer") for name in changed) and any(name.startswith("budget") for name in changed)
    for name in (BEST, LAST):
        same(checkpoint.load(tmp_path / name, model), run.lkv)


@pytest.mark.parametrize("at", [3, 6])
def test_resumed_bit_for_bit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, at: int
) -> None:
    whole = trainer(model, tokenizer, tmp_path / "whole").run()
    trainer(model, tokenizer, tmp_path / "parts").run(until=at)
    same(trainer(model, tokenizer, tmp_path / "parts").run(), whole)


def test_interrupted_between_saves_goes_on_from_the_last_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole = trainer(model, tokenizer, tmp_path / "whole").run()
    trainer(model, tokenizer, tmp_path / "parts").run(until=5)
    again = trainer(model, tokenizer, tmp_path / "parts")
    same(again.run(), whole)
    (tmp_path / "parts" / (STATE + ".part")).write_bytes(b"torn")  # a save that was interrupted
    same(trainer(model, tokenizer, tmp_path / "parts").run(), whole)


def test_parts_of_a_step_are_the_step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole = trainer(model, tokenizer, tmp_path / "whole").run(until=2)
    parts = trainer(model, tokenizer, tmp_path / "parts", accumulate=2).run(until=2)
    same(whole, parts, rtol=1e-4, atol=1e-5)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """20 steps of gloo with half of the texts each, beside 20 steps with all of them."""
    script = str(Path(__file__).with_name("two_processes.py"))
    subprocess.run([sys.executable, script, str(tmp_path / "one")], check=True, timeout=300)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", script]
    subprocess.run([*launch, str(tmp_path / "two")], check=True, timeout=300)
    same(checkpoint.load(tmp_path / "one" / LAST), checkpoint.load(tmp_path / "two" / LAST), rtol=1e-5, atol=1e-5)


def test_validation_decides_which_checkpoint_is_best(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run = trainer(model, tokenizer, tmp_path)
    seen: list[dict[str, torch.Tensor]] = []

    def validate(policy: Learned) -> dict[str, float]:
        seen.append({name: t.clone() for name, t in checkpoint.weights(policy).items()})
        return {"0.15": [0.7, 0.2][len(seen) - 1]}

    run.validate = validate
    run.run()
    best, last = (
        checkpoint.weights(checkpoint.load(tmp_path / BEST)),
        checkpoint.weights(checkpoint.load(tmp_path / LAST)),
    )
    assert all(torch.equal(best[name], seen[0][name]) for name in best)
    assert all(torch.equal(last[name], seen[1][name]) for name in last)


def test_another_configuration_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trainer(model, tokenizer, tmp_path).run(until=3)
    with pytest.raises(ValueError, match=r"expected the configuration of the run in .* got another \['lr_scorer'\]"):
        trainer(model, tokenizer, tmp_path, lr_scorer=0.5).run()
