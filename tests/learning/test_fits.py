"""No command reads a text, with what is asked about it, that is longer than what its model reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_texts import files, model, tokenizer

from lkv import cli, retriever
from lkv.evaluate.methods import FULL, Method
from lkv.evaluate.run import Setting, evaluate
from lkv.tasks import Sample
from lkv.text import check_fits

MOST = 900
SHORT = ("--facts", "2", "--continuation", "8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model(max_position_embeddings=MOST).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--tasks", "single", "--samples", "1", "--methods", "full"],
        ["eval", "--text", "FILES", "--passages", "1", "--methods", "full", "--out", "OUT", *SHORT],
        ["train", "--tasks", "single", "--out", "OUT"],
        ["train", "--text", "FILES", "--texts", "1", "--validation", "1", "--out", "OUT", *SHORT],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("length", ["895", "901"])
def test_a_command_refuses_it_at_once(
    command: list[str], length: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A length of 895 is one that the model reads, but for the question behind it."""
    given = {"FILES": list(map(str, files(tmp_path / "texts"))), "OUT": [str(tmp_path / "out")]}
    words = [word for part in command for word in given.get(part, [part])]
    assert cli.main([*words, "--model", str(folder), "--length", length]) == 2
    assert f"expected texts of at most the {MOST} tokens that the model reads" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.*"))


def test_no_sample_is_answered_that_is_longer() -> None:
    """In the library as well, to the token; the retriever's tokens are words."""
    read, words = retriever.load()
    most = read.config.max_position_embeddings
    context = "k 1 . " * (most // 3)
    left = most - len(words(context, add_special_tokens=False).input_ids)
    assert left >= 0
    check_fits(read, most, "lkv eval")
    sample = Sample("single", 7, context, "k", "1", ("1",), (), 0)
    with pytest.raises(ValueError, match=f"^lkv eval: expected texts of at most the {most} tokens .* got single 7 of"):
        next(iter(evaluate(read, words, [sample], [Method(FULL, None)], Setting((1.0,), limit=left + 5))))
