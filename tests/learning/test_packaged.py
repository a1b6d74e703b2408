"""Checkpoints of the package: found by the name of a model, and put there in a form that changes nothing."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import lkv
from lkv import models, ship
from lkv.cli import models as options
from lkv.policies.lkv import Learned, checkpoint, packaged
from lkv.policies.lkv.checkpoint import Design, Shape

DESIGN = Design(hidden=16)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the package's, empty; and one without any names to stand in."""
    (tmp_path / "package").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "package")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "package"


def saved(folder: Path, model: PreTrainedModel, seed: int = 0, design: Design = DESIGN) -> Learned:
    torch.manual_seed(seed)
    policy = design.build(Shape.of(model))
    checkpoint.save(folder, policy, design, Shape.of(model), {"seed": seed})
    return policy


def test_all_fit_their_models_and_are_small() -> None:
    assert packaged.FOLDER.parent == Path(lkv.__file__).parent
    known = {models.RETRIEVER, *models.PACKAGED}
    assert "retriever" in packaged.names() and {name.partition("-")[0] for name in packaged.names()} <= known
    model, _ = models.load("retriever")
    lkv.load("retriever", model)
    files = [path for path in packaged.FOLDER.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {checkpoint.CONFIG, checkpoint.WEIGHTS}
    assert sum(path.stat().st_size for path in files) <= 4e6


def test_names_are_of_models_and_nothing_else(folder: Path, model: PreTrainedModel) -> None:
    saved(folder / "tiny", model)
    (folder / "notes.txt").write_text("")
    assert packaged.names() == ["tiny"]
    assert packaged.find("tiny") == packaged.find(Path("tiny")) == folder / "tiny"
    for name in ("", ".", "..", "tiny/", "./tiny", "../package/tiny", str(folder / "tiny"), "notes.txt", "small"):
        assert packaged.find(name) is None, name


def test_a_folder_goes_before_a_name(folder: Path, model: PreTrainedModel) -> None:
    """The checkpoint of the package never stands in for one that is broken."""
    theirs = saved(folder / "tiny", model, 1)
    assert torch.equal(lkv.load("tiny", model).scorer.up, theirs.scorer.up)
    ours = saved(Path("tiny"), model, 2)
    assert torch.equal(lkv.load("tiny", model).scorer.up, ours.scorer.up)
    Path("tiny", checkpoint.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"^lkv.load: expected .* in tiny, found none$"):
        lkv.load("tiny", model)


def test_what_there_is_is_named(folder: Path, model: PreTrainedModel) -> None:
    with pytest.raises(FileNotFoundError, match=r"in small, found none; .* checkpoints of these names: none$"):
        lkv.load("small")
    saved(folder / "tiny", model)
    saved(folder / "other", model)
    with pytest.raises(FileNotFoundError, match=r"in small, found none; .* of these names: other, tiny$"):
        lkv.load("small")


def test_commands_take_the_one_of_their_model(folder: Path, model: PreTrainedModel) -> None:
    saved(folder / "tiny", model)
    given = Namespace(model="tiny", checkpoint=None)
    assert options.checkpoint(given) == folder / "tiny"
    assert options.checkpoint(Namespace(model="small", checkpoint=None)) is None
    assert options.checkpoint(Namespace(model="tiny", checkpoint=Path("mine"))) == Path("mine")


def test_what_is_shipped_keeps_the_same_rows(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """Half the bytes; scores differ by what float16 rounds, budgets not at all."""
    policy = saved(tmp_path / "best", model)
    assert ship.main(["retriever", "--checkpoint", str(tmp_path / "best")]) == 0
    stored = load_file(folder / "retriever" / checkpoint.WEIGHTS)
    assert stored["scorer.up"].dtype == torch.float16
    assert {t.dtype for name, t in stored.items() if name != "scorer.up"} == {torch.float32}
    again = lkv.load("retriever", model)
    assert again.scorer.up.dtype == torch.float32
    assert torch.equal(again.table(30, 100), policy.table(30, 100))
    features, valid = torch.randn(1, 2, 500, 32), torch.ones(1, 2, 500, dtype=torch.bool)
    for layer in range(3):
        ours, theirs = (x.scorer(layer, features, valid) for x in (policy, again))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)  # of deviation 1


def test_what_cannot_be_shipped_leaves_the_old_one(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    old = saved(folder / "retriever", model, 1)
    large = saved(tmp_path / "large", model, 2)
    with torch.no_grad():
        large.scorer.up.mul_(1e6)
    checkpoint.save(tmp_path / "large", large, DESIGN, Shape.of(model), {})
    saved(tmp_path / "wide", model, design=Design(hidden=12000))
    for name, message in (("large", "float16 can hold"), ("wide", "4000000 bytes at most"), ("none", "found none")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ship.put(tmp_path / name, "retriever")
    assert torch.equal(lkv.load("retriever", model).scorer.up, old.scorer.up)


def test_a_second_checkpoint_has_a_name_of_its_own(
    folder: Path, model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = saved(tmp_path / "a", model, 1), saved(tmp_path / "b", model, 2)
    assert ship.main(["smollm2", "--checkpoint", str(tmp_path / "a")]) == 0
    assert ship.main(["smollm2", "--checkpoint", str(tmp_path / "b"), "--name", "smollm2-fixed"]) == 0
    assert packaged.names() == ["smollm2", "smollm2-fixed"]
    for name, ours in (("smollm2", first), ("smollm2-fixed", second)):
        assert torch.equal(lkv.load(name, model).scorer.up, ours.scorer.up.half().float())
    for name in ("fixed", "smollm2fixed", "../smollm2-fixed", "retriever"):
        with pytest.raises(SystemExit):
            ship.main(["smollm2", "--checkpoint", str(tmp_path / "a"), "--name", name])
        assert f"expected --name smollm2 or smollm2-KIND, got {name}" in capsys.readouterr().err


def test_only_the_retriever_has_weights_to_ship(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        ship.main(["smollm2", "--weights", "x"])
    assert "expected --weights of the model retriever, got smollm2" in capsys.readouterr().err
