"""Training runs: what they leave, the same in parts and in two processes, refused where they cannot be right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.learn.config import TrainConfig
from lkv.learn.metrics import METRICS
from lkv.learn.train import BEST, LAST, STATE, Trainer
from lkv.policies.lkv import Learned, checkpoint
from lkv.policies.lkv.checkpoint import Design
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


def test_parts_of_a_step_are_the_step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    whole = trainer(model, tokenizer, tmp_path / "whole").run(until=2)
    parts = trainer(model, tokenizer, tmp_path / "parts", accumulate=2).run(until=2)
    same(whole, parts, rtol=1e-4, atol=1e-5)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Two over gloo with half of the texts each, one at a time, beside one that reads them all at once.

    Compared is what is linear in the gradients: where one is all but zero, Adam makes of its rounding a whole step.
    """
    script = str(Path(__file__).with_name("two_processes.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    commands = {"one": [sys.executable, script], "two": launch}
    parts = {"one": "1", "two": "2"}
    runs = [subprocess.Popen([*c, str(tmp_path / name), parts[name]]) for name, c in commands.items()]
    try:
        assert [run.wait(timeout=300) for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.kill()
    one, two = (torch.load(tmp_path / name / STATE, weights_only=True) for name in commands)
    assert one["step"] == two["step"] == 2
    for key, state in one["optimizer"]["state"].items():
        moment, other = state["exp_avg"], two["optimizer"]["state"][key]["exp_avg"]
        torch.testing.assert_close(other, moment, rtol=1e-3, atol=1e-3 * float(moment.abs().max()) + 1e-9)
    lines = [[json.loads(line) for line in (tmp_path / name / METRICS).read_text().splitlines()] for name in commands]
    for a, b in zip(*lines, strict=True):
        assert {x: b[x] for x in b if x != "seconds"} == pytest.approx({x: a[x] for x in a if x != "seconds"}, rel=1e-3)
