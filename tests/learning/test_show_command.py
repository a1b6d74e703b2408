"""`lkv show` from end to end, on a tiny model in a folder."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_folder
from transformers import PreTrainedModel

from lkv import models, retriever
from lkv.cli import main
from lkv.cli.show import policy
from lkv.policies.lkv import checkpoint

TEXT = "The code is 41. Nobody knows more. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> PreTrainedModel:
    return models.load(model)[0]


def run(*options: object) -> int:
    return main(["show", *map(str, options)])


def data_of(page: Path) -> dict:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_a_file_two_policies_and_a_question(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "essay.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace(". ", ".\r\n").encode())
    page = tmp_path / "page.html"
    options = ["--text", tmp_path / "essay.txt", "--out", page, "--policy", "snapkv", "--policy", "kvzip"]
    options += ["--question", "What is the code?", "--question", "Why?", "--answer-tokens", 4, "--retention", 0.25]
    assert run("--model", model, *options) == 0
    data = data_of(page)
    assert "".join(data["units"]) == "<s>" + TEXT.replace(". ", ".\n")
    assert (data["title"], data["model"]) == ("essay.txt", model.name) and [x["name"] for x in data["methods"]] == [
        "snapkv",
        "kvzip",
    ]
    assert data["questions"] == ["What is the code?", "Why?"] and data["retention"] == 0.25
    printed = capsys.readouterr().out.splitlines()
    rows = round(0.25 * data["tokens"]) * 4
    assert printed[0] == "281 tokens, 2 layers, 4 KV heads in all"
    assert printed[1].split() == ["full", "1,124", "rows", "100.0%", "0.07", "MiB", "of", "keys", "and", "values"]
    assert [line.split()[:2] for line in printed[2:4]] == [["snapkv", str(rows)], ["kvzip", str(rows)]]
    assert printed[4] == "What is the code?" and printed[5].startswith("  full ")
    assert printed[-1] == f"{page}: {page.stat().st_size / 1024:,.0f} KiB"


def test_standard_input(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    options = ["--text", "-", "--policy", "streaming_llm", "--protect", 9, "--out", tmp_path / "page.html"]
    assert run("--model", model, *options) == 0
    data = data_of(tmp_path / "page.html")
    assert data["title"] == "text" and "".join(data["units"]) == "<s>" + TEXT and data["questions"] == []


def test_policies_are_names_or_checkpoints(loaded: PreTrainedModel, tmp_path: Path) -> None:
    design, shape = checkpoint.Design(hidden=8), checkpoint.Shape.of(loaded)
    checkpoint.save(tmp_path / "run", design.build(shape), design, shape, {})
    found = policy(str(tmp_path / "run"), "any", loaded)
    assert type(found).__name__ == "LKV" and policy("snapkv", "any", loaded).window == 32
    assert type(policy("lkv", "retriever", retriever.load()[0])).__name__ == "LKV"
    with pytest.raises(FileNotFoundError, match="expected lkv.json and lkv.safetensors in"):
        policy("lkv", "no-such-model", loaded)


def test_a_missing_text(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("--policy", "snapkv", "--out", "page.html")
    assert "--text" in capsys.readouterr().err


REFUSED = {
    "no file": (["--text", "/none"], "expected a file with text for --text, got /none: No such file or directory"),
    "a folder": (["--text", "/"], "expected a file with text for --text, got /: Is a directory"),
    "empty": (["--text", "empty.txt"], "expected a text in empty.txt, got none"),
    "no text": (["--text", "bytes.txt"], "expected a text in UTF-8 in bytes.txt, got other bytes"),
    "unknown": (
        ["--policy", "h2o?"],
        "expected a --policy of .*, lkv, .*retriever.* or the folder of a checkpoint, got 'h2o[?]'",
    ),
    "not learned": (
        ["--policy", "lkv", "--model", "/m"],
        "expected a model with a checkpoint in the package for --policy lkv, of .*retriever.*, got '/m'; lkv train",
    ),
    "three": (
        ["--policy", "random", "--policy", "adakv"],
        "expected one --policy or two different ones, got snapkv",
    ),
    "twice": (["--policy", "snapkv"], "expected one --policy or two different ones, got snapkv, snapkv"),
    "retention": (["--retention", "0"], r"expected --retention in \(0, 1\], got 0"),
    "a folder for the page": (["--out", "/"], "expected a file for --out, got the folder /"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_model_is_loaded(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text(TEXT)
    Path("empty.txt").write_text(" \n")
    Path("bytes.txt").write_bytes(b"a\xff\xfeb")
    assert run("--text", "good.txt", "--policy", "snapkv", "--out", "page.html", *options) == 2
    assert re.search(message, capsys.readouterr().err) and not Path("page.html").exists()
