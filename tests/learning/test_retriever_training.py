"""How the retriever is trained: its loss, one step, the way through the stages, and how it is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lkv import retriever, ship, tasks
from lkv.retriever import model, train
from lkv.retriever.data import IGNORE, MIX, Stage, repeated, size
from lkv.tasks import Words


def test_every_task_can_be_made_in_every_stage() -> None:
    for stage in (*train.GROW[1:], *train.SETTLE):
        for task in MIX:
            assert tasks.scene(task, 0, stage.length, split="train", **size(task, stage)).questions


class Given(nn.Module):
    """A model whose hidden states are given, with an output matrix that hands them on as logits."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.device, self.lm_head = hidden.device, nn.Linear(hidden.shape[-1], hidden.shape[-1], bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.hidden = hidden

    def model(self, tokens: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_label() -> None:
    """By hand: of a label the token before it foretells the odds; 3/4 for one, 1/2 for another, 1/8 for a wrong one."""
    logits = torch.zeros(1, 5, 4)
    for place, label, p in ((0, 2, 0.75), (2, 1, 0.5), (3, 3, 0.125)):
        logits[0, place] = torch.tensor((1 - p) / 3).log()
        logits[0, place, label] = torch.tensor(p).log()
    logits[0, 4] = torch.tensor([9.0, -9.0, 0.0, 0.0])  # behind the last label
    labels = torch.tensor([[0, 2, IGNORE, 1, 3]])
    labels[0, 0] = 3  # nothing stands before it: never foretold
    loss, right = train.loss_of(Given(logits), torch.zeros(1, 5, dtype=torch.int64), labels)
    want = -(torch.tensor([0.75, 0.5, 0.125]).log()).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-2)  # logits pass through bfloat16
    assert loss.dtype == torch.float32 and right.tolist() == [True, True, False]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> train.Run:
    monkeypatch.setattr(train, "build", lambda words, seed: tiny(words, seed))
    return train.Run(tmp_path / "run", "cpu", 1e-2, seed=0)


def tiny(words: Words, seed: int) -> nn.Module:
    config = model.build(words).config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 16, 16, 1
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 8
    config.layer_types = None
    torch.manual_seed(seed)
    return type(model.build(words))(config)


def test_steps_learn_by_clipped_gradients_and_a_rate_that_rises(
    run: train.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped, clip = [], nn.utils.clip_grad_norm_

    def spy(parameters: object, largest: float) -> Tensor:
        parameters = list(parameters)
        clip(parameters, largest)
        clipped.append((len(parameters), largest, torch.stack([p.grad.norm() for p in parameters]).norm().item()))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    batch = repeated(torch.Generator().manual_seed(0), 4, 400)
    monkeypatch.setattr(train, "repeated", lambda *a: batch)
    stage, losses, rates = Stage(0, 0, 4, 1), [], []
    present = train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *a: (losses.append(present(*a)), losses[-1])[1])
    for _ in range(60):
        run.step(stage, rate=0.5)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5e-2 * min(1, (i + 1) / 50) for i in range(60)])
    assert all(n == len(list(run.model.parameters())) and c == 1.0 and norm < 1.001 for n, c, norm in clipped)
    mean = [sum(loss.item() for loss, _ in part) / 10 for part in (losses[:10], losses[-10:])]
    assert mean[1] < mean[0] - 0.1
    assert run.steps == 60 and run.model.config._attn_implementation == model.ATTENTION
    assert run.accuracy == pytest.approx(sum(r.float().mean().item() for _, r in losses[-24:]) / 24)
    entries = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [20, 40, 60]
    assert entries[1]["loss"] == pytest.approx(losses[39][0].item(), abs=1e-4) and entries[2]["tokens"] == run.tokens


def test_gradients_are_of_one_step_alone(run: train.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda parameters, _: seen.append([p.grad.clone() for p in parameters])
    )
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    batch = repeated(torch.Generator().manual_seed(0), 2, 400)
    monkeypatch.setattr(train, "repeated", lambda *a: batch)
    for _ in range(2):
        run.step(Stage(0, 0, 2, 1))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)) and any(a.any() for a in seen[0])


def test_accuracy_is_of_the_stage_and_not_of_repeats_between(run: train.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some steps go on with repeated sequences, which say nothing of the stage."""
    requests = []
    monkeypatch.setattr(train, "repeated", lambda *a: (requests.append(a[3]), repeated(*a))[1])
    monkeypatch.setattr(train, "REPEATS", 0.5)
    for _ in range(20):
        run.step(Stage(120, 2, 1, 1))
    assert 4 <= len(requests) <= 16 and set(requests) == {40}
    assert len(run.recent) == 20 - len(requests) < train.SMOOTH


def test_the_way_through_the_stages(run: train.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is left once it is known, or after its steps; at the end all lengths are read while the rate falls."""
    known, unknown = Stage(32, 2, 3, 500), Stage(64, 2, 2, 40)
    settle = (Stage(32, 2, 1, 200), Stage(64, 2, 1, 110))
    taken, saved, probed = [], [], []

    class Walk(train.Run):
        def step(self, stage: Stage, rate: float = 1.0) -> None:
            taken.append((stage, rate))
            self.recent = [*self.recent, 1.0 if stage is known else 0.5][-train.SMOOTH :]

        def save(self, stage: Stage) -> None:
            saved.append((len(taken), stage))

    monkeypatch.setattr(train, "Run", Walk)
    monkeypatch.setattr(train, "GROW", (known, unknown))
    monkeypatch.setattr(train, "SETTLE", settle)
    train.main(["--out", str(tmp_path / "out"), "--device", "cpu"])
    assert [stage for stage, _ in taken[:64]] == [known] * 24 + [unknown] * 40
    assert {rate for _, rate in taken[:64]} == {1.0}
    rest = taken[64:]
    assert [sum(stage is s for stage, _ in rest) for s in settle] == [200, 110]
    assert [stage for stage, _ in rest[:200]] != [settle[0]] * 200
    assert [rate for _, rate in rest] == pytest.approx([1 - 0.98 * i / 310 for i in range(310)])
    assert saved == [(24, known), (64, unknown), (64 + 300, settle[1])]
    monkeypatch.setattr(train, "probe", lambda *a: probed.append(a[2]) or {"single": 1.0})
    for length in (63, 64):
        train.Run.__mro__[1].save(run, Stage(length, 2, 1, 1))
    assert [stage.length for stage in probed] == [64] and (run.out / "config.json").exists()


def test_probes_are_of_the_validation_split(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    made, present = [], tasks.make
    monkeypatch.setattr(tasks, "make", lambda *a, **o: (made.append((*a[:3], o["split"])), present(*a, **o))[1])
    found = train.probe(tiny(words, 0).eval(), words, Stage(128, 4, 1, 1))
    assert made == [(task, i, 128, "validation") for task in tasks.TASKS for i in range(12)]
    assert found.keys() == tasks.TASKS.keys() and all(0 <= share <= 1 for share in found.values())


def test_it_is_shipped_in_bfloat16(run: train.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.model.save_pretrained(tmp_path / "trained")
    monkeypatch.setattr(retriever, "PATH", tmp_path / "weights")
    assert ship.main(["retriever", "--weights", str(tmp_path / "trained")]) == 0
    loaded, tokenizer = retriever.load(tmp_path / "weights")
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(loaded.parameters()).dtype == torch.float32 and not loaded.training
    for mine, theirs in zip(loaded.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs.bfloat16().float())
    words = Words()
    text = "<s> set Bala to 41 87 . </s> <pad> nonsense"
    assert tokenizer(text).input_ids[:-1] == words.encode(text.rpartition(" ")[0])
    assert tokenizer(text).input_ids[-1] == tokenizer.unk_token_id == words.vocabulary["<unk>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.decode(words.encode("set Bala to 41 87 .")) == "set Bala to 41 87 ."
