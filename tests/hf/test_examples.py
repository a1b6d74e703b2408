"""The scripts of examples/, with a tiny model and a tokenizer of words, both made here."""

from __future__ import annotations

import io
import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
from families import VOCABULARY, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
ROW_BYTES = 2 * 2 * 2 * 8 * 4  # K and V, two layers, two heads of 8 floats


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = {"<unk>": 0} | {f"word{i}": i for i in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_input_names=names).save_pretrained(
        folder
    )
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def run(saved, monkeypatch, capsys):
    def script(name: str, *arguments: object, stdin: str = "") -> tuple[list[str], list[str]]:
        monkeypatch.setattr("sys.argv", [name, str(saved), *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err.splitlines()

    return script


def numbers(line: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", line)]


def test_generate(run, tmp_path):
    (tmp_path / "text").write_text(" ".join(f"word{i % 60 + 1}" for i in range(400)))
    outputs, *_, last = run("generate.py", tmp_path / "text")[0]
    assert 1 <= len(outputs.split()) <= 64  # "<unk>" is a special token, and not printed
    tokens, size = numbers(last)
    answer = tokens + 1 - 400  # its last token is not read
    assert 1 <= answer <= 64 and size == (60 + answer - 1) * ROW_BYTES  # 15 % of the text, and the answer


def test_chat(run):
    outputs, counts = run("chat.py", stdin="word1 word2 word3\nword4\nword5 word6\n")
    assert len(outputs) == 3 and all(1 <= len(answer.split()) <= 64 for answer in outputs)
    lengths = [numbers(line) for line in counts if line.startswith("[")]
    assert len(lengths) == 3 and lengths[0][0] < lengths[1][0] < lengths[2][0]
    assert all(size < length * ROW_BYTES for length, size in lengths)


def test_endless(run):
    *_, last = run("endless.py", 700)[0]
    tokens, size = numbers(last)
    assert tokens == 4 + 699 and 448 * ROW_BYTES <= size <= 512 * ROW_BYTES


def test_a_policy_of_its_own(run):
    outputs, counts = run("policy.py", stdin=" ".join(f"word{i % 60 + 1}" for i in range(400)))
    tokens, size = numbers(counts[-1])
    assert outputs and 400 < tokens < 464
    assert size == (100 + tokens - 400) * ROW_BYTES  # 25 % of the text, and what followed


@pytest.mark.skipif(find_spec("transformers.generation.continuous_batching.cache_allocators") is None, reason="too old")
def test_continuous_batching(run, tmp_path):
    text = "\n\n".join(" ".join(f"word{(i * n) % 60 + 1}" for i in range(64)) for n in range(1, 7))
    (tmp_path / "text").write_text(text)
    whole, evicted = (line for line in run("continuous_batching.py", tmp_path / "text")[0] if "forward passes" in line)
    _, steps, blocks, freed = numbers(whole)
    assert blocks == 24 and freed == 0
    share, fewer, _, freed = numbers(evicted)
    assert share == 25 and fewer < steps and freed >= 6 * 3  # 48 of 64 rows, in blocks of 16
