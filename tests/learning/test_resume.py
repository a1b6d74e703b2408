"""Runs that were interrupted go on as if nothing had happened: weights, optimizer and the best score so far."""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.learn import metrics, train
from lkv.learn.config import TrainConfig
from lkv.learn.metrics import METRICS
from lkv.learn.train import BEST, LAST, STATE, Trainer
from lkv.policies.lkv import Learned, checkpoint
from lkv.policies.lkv.checkpoint import Design
from lkv.tasks import Words

CONFIG = TrainConfig(
    design=Design(hidden=8), tasks=("single", "multi_key"), steps=6, warm_steps=2, batch=2, questions=2, length=60,
    answer_tokens=3, validate_every=2, retention=(0.3, 0.6),
)  # fmt: skip


@pytest.fixture
def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    def trainer(name: str = "run", scores: Sequence[dict[str, float]] = (), **changes: object) -> Trainer:
        """`scores` are what validations give, one after the other."""
        run = Trainer(model, tokenizer, Words(), replace(CONFIG, **changes), tmp_path / name)
        left = list(scores)
        if scores:
            run.validate = lambda policy: left.pop(0)
        return run

    return trainer


def state(run: Trainer) -> dict[str, object]:
    return torch.load(run.folder / STATE, weights_only=True)


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def facts(run: Trainer, name: str) -> tuple[int, float]:
    results = json.loads((run.folder / name / checkpoint.CONFIG).read_text())["facts"]
    return results["step"], results["validation"]


def test_folders_are_made_and_numbers_are_shown(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On TensorBoard's board, which is not installed here, as in the lines of the file."""
    shown: list[tuple[str, float, int]] = []
    board = type("Board", (), {"add_scalar": lambda self, *given: shown.append(given)})
    monkeypatch.setattr(metrics, "_board", lambda folder: board())
    run = make("new/folders/run", steps=1, warm_steps=1)
    run.run()
    lines = [json.loads(line) for line in (run.folder / METRICS).read_text().splitlines()]
    assert len(lines) == 2
    assert shown == [(name, x, line["step"]) for line in lines for name, x in line.items() if name != "step"]


def test_the_bar_begins_where_the_run_was(make, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options, file=io.StringIO())
            bars.append(self)

    monkeypatch.setattr(train, "tqdm", Bar)
    make().run(2)
    make().run(3)
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 4, 4), (4, 5, 5)]  # two warm steps before
    assert all("loss=" in bar.postfix and "seconds" not in bar.postfix for bar in bars)


def test_numbers_go_to_a_board_in_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: ("board", folder)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert metrics._board(tmp_path) == ("board", str(tmp_path / "tensorboard"))


@pytest.mark.parametrize("stops", [[2], [4], [3], [1, 2, 5], [6]], ids=str)
def test_weights_and_optimizer_are_those_of_an_uninterrupted_run(make, stops: list[int]) -> None:
    """Bit by bit, wherever it stopped: at a save, between two of them, before the first one, at the end."""
    whole = make("whole")
    policy = whole.run()
    for stop in stops:
        make("parts").run(until=stop)
    parts = make("parts")
    again = parts.run()
    assert parts.step == 6 and equal(checkpoint.weights(again), checkpoint.weights(policy))
    assert equal(parts.optimizer.state_dict(), whole.optimizer.state_dict())
    assert equal(state(parts), state(whole))
    moments = state(whole)["optimizer"]["state"].values()
    assert all(int(moment["step"]) == 8 for moment in moments) and any(m["exp_avg"].any() for m in moments)


@pytest.mark.parametrize("stop", [-1, 0, 1, 3])
def test_a_run_goes_on_from_its_last_save_between_validations(make, monkeypatch, stop: int) -> None:
    """In the regression as well as after it; what was done since the save is done again."""
    whole = make("whole").run()
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    parts = make("parts")
    parts.run(until=stop)
    assert state(parts)["step"] == stop
    begun: list[int] = []
    again = make("parts")
    monkeypatch.setattr(again, "_fit_inputs", lambda: begun.append(0))
    assert equal(checkpoint.weights(again.run()), checkpoint.weights(whole)) and not begun


def test_it_is_saved_now_and_then_between_validations(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    run, saved = make(validate_every=6), []
    monkeypatch.setattr(run, "_save_state", lambda: saved.append(run.step))
    run.run()
    assert saved == [0, 3, 6]


def test_a_finished_run_does_nothing_more(make) -> None:
    make().run()
    lines = (make().folder / METRICS).read_text()
    again = make(scores=[{}])
    again.source.examples = lambda *args: pytest.fail("a text was read again")
    again.run()
    assert (again.folder / METRICS).read_text() == lines


def test_every_step_has_one_line(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are done again, and the one whose line was torn."""
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    run = make(validate_every=6)
    run.run(until=5)  # saved after the third
    with (run.folder / METRICS).open("a") as file:
        file.write('{"step": 1, "lo{"step": 1}\n{"step": 6, "lo')
    make(validate_every=6).run()
    lines = [json.loads(line) for line in (run.folder / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1 - run.config.warm_steps, 7))


def test_a_torn_save_is_not_read(make) -> None:
    whole = make("whole").run()
    parts = make("parts")
    parts.run(until=4)
    (parts.folder / (STATE + ".part")).write_bytes(b"torn")
    assert equal(checkpoint.weights(make("parts").run()), checkpoint.weights(whole))


@pytest.mark.parametrize("stop", [None, 2, 3, 4])
@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.7, 0.2, 0.5], 2), ([0.2, 0.7, 0.5], 4), ([0.2, 0.5, 0.7], 6), ([0.5, 0.5, 0.5], 2), ([0.0, 0.0, 0.0], 2)],
    ids=str,
)
def test_the_best_score_is_remembered_over_an_interruption(make, scores: list[float], best: int, stop: int) -> None:
    """The highest one, the first of equals; every checkpoint states its own."""
    given = [{"0.15": score} for score in scores]
    if stop is not None:
        make(scores=given).run(until=stop)
    run = make(scores=given if stop is None else given[stop // 2 :])
    run.run()
    assert facts(run, BEST) == (best, scores[best // 2 - 1])
    assert facts(run, LAST) == (6, scores[-1])
    assert state(run)["best"] == run.best == max(scores)


def test_the_mean_over_retentions_decides_and_what_was_validated_is_what_is_saved(make) -> None:
    run, seen = make(), []

    def validate(policy: Learned) -> dict[str, float]:
        seen.append({name: t.clone() for name, t in checkpoint.weights(policy).items()})
        return [{"0.05": 1.0, "0.15": 0.0}, {"0.05": 0.55, "0.15": 0.55}, {"0.05": 0.0, "0.15": 1.05}][len(seen) - 1]

    run.validate = validate
    run.run()
    assert facts(run, BEST) == (4, pytest.approx(0.55))
    for name, step in ((BEST, 1), (LAST, 2)):
        assert equal(checkpoint.weights(checkpoint.load(run.folder / name)), seen[step])
    lines = {x["step"]: x for x in map(json.loads, (run.folder / METRICS).read_text().splitlines())}
    assert lines[4]["validation/0.05"] == 0.55 and "validation/0.05" not in lines[5]


@pytest.mark.parametrize(("steps", "every", "at"), [(5, 2, [2, 4, 5]), (4, 2, [2, 4]), (3, 100, [3])])
def test_when_it_is_validated(make, steps: int, every: int, at: list[int]) -> None:
    """Every so many steps of distillation, and behind the last one; never during the warm start."""
    run, seen = make(steps=steps, validate_every=every), []
    run.validate = lambda policy: (seen.append(run.step), {"0.15": 0.5})[1]
    run.run()
    assert seen == at


def test_without_validation_the_last_checkpoint_is_the_best(make) -> None:
    run = make()
    run.run()
    assert facts(run, BEST)[0] == facts(run, LAST)[0] == 6


def test_another_configuration_is_refused(make) -> None:
    make().run(until=2)
    for changes in (dict(lr_scorer=0.5), dict(seed=3), dict(design=Design(hidden=8, sink=2))):
        expected = rf"^lkv train: expected the configuration of the run in .* got another \['{next(iter(changes))}'\]"
        with pytest.raises(ValueError, match=expected):
            make(**changes).run()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
def test_memory_that_was_freed_goes_back(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many steps: between blocks that live on, where the heap would keep it."""
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    run = make(warm_steps=0)
    run.run(until=2)
    blocks = [torch.ones(1 << 16, dtype=torch.uint8) for _ in range(2000)]
    del blocks[::2]
    before = resident()
    run.run(until=3)
    assert resident() < before - (50 << 20) and len(blocks) == 1000
