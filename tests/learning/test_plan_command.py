"""`lkv plan`: numbers as text and as JSON, from names, folders and files, and what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import tiny_folder
from transformers import AutoConfig

from lkv import retriever
from lkv.cli import main
from lkv.cli.plan import _bytes, size

MODEL = {
    "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 101,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "dtype": "bfloat16", "max_position_embeddings": 4096,
}  # fmt: skip
OPTIONS = ["--context", 1000, "--batch", 3, "--retention", 0.25, "--page", 16, "--bandwidth", 2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path / "config.json"


def run(*options: object) -> int:
    return main(["plan", *map(str, options)])


def test_numbers_of_layers_and_of_all(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--model", config, *OPTIONS, "--memory", "1MB", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    row = 2 * (8 + 8) * 2
    sliding, full = facts["layers"][:2]
    assert facts["layers"][2] == {**sliding, "index": 2} and facts["layers"][3] == {**full, "index": 3}
    # Tokens 750 to 999 in pages 46 to 62; the window's 100 rows in pages 56 to 62.
    assert (full["kind"], full["rows_full"], full["rows_kept"]) == ("full", 1000, 250)
    assert (full["full"], full["kept"]) == (3 * 1008 * row, 3 * 17 * 16 * row)
    assert (full["full_waste"], full["kept_waste"]) == (3 * 8 * row, 3 * 22 * row)
    assert (sliding["kind"], sliding["window"], sliding["rows_full"], sliding["rows_kept"]) == (
        "sliding",
        101,
        100,
        100,
    )
    assert sliding["full"] == sliding["kept"] == 3 * 7 * 16 * row
    for name in ("full", "kept", "full_waste", "kept_waste"):
        assert facts[name] == sum(layer[name] for layer in facts["layers"])
    assert facts["reading"] == facts["kept"] // 3 * 2 + facts["full"] // 3
    moved = 3 * 2 * (1000 * 2 * 4 + 2 * 250 * row)
    assert facts["eviction"] == {"moved": moved, "bandwidth": 2e9, "seconds": moved / 2e9}
    fits = facts["fits"]
    rest = 1_000_000 - fits["weights"]
    assert fits["weights"] == 2 * sum(p.numel() for p in tiny_folder_model(config))
    assert fits["batch"]["full"] == rest // (facts["full"] // 3)
    assert fits["batch"]["kept"] == (rest - facts["full"] // 3) // (facts["kept"] // 3) + 1
    assert fits["longest"]["kept"] > fits["longest"]["full"] > 1000


def tiny_folder_model(config: Path) -> list:
    from transformers import AutoModelForCausalLM

    return list(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).parameters())


def test_the_text_has_the_numbers_of_the_json(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--model", config, *OPTIONS, "--memory", "1MB", "--weights", "0") == 0
    text = capsys.readouterr().out
    assert f"{config} (gemma2), K and V in bfloat16, pages of 16 rows\n3 x 1,000 tokens, retention 0.25\n" in text
    lines = [line.split() for line in text.splitlines()]
    assert [
        "1",
        "full",
        "attention",
        "2",
        "x",
        "8",
        "1,000",
        "250",
        "189.00",
        "KiB",
        "51.00",
        "KiB",
        "4.12",
        "KiB",
    ] in lines
    assert [
        "0",
        "window",
        "of",
        "101",
        "2",
        "x",
        "8",
        "100",
        "100",
        "21.00",
        "KiB",
        "21.00",
        "KiB",
        "2.25",
        "KiB",
    ] in lines
    assert ["all", "420.00", "KiB", "144.00", "KiB", "12.75", "KiB"] in lines
    assert "While the last prompt is read: 236.00 KiB" in text and "at 2.0 GB/s" in text
    assert "largest batch of 1,000 tokens: 6 in full, 18 kept" in text and "made for 4,096 tokens" in text


def test_models_by_name_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tiny_folder.save(tmp_path)
    wanted = AutoConfig.from_pretrained(folder)
    assert run("--model", folder, "--context", 64, "--bandwidth", 1, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    heads, dim = wanted.num_key_value_heads, wanted.head_dim
    assert facts["full"] == wanted.num_hidden_layers * heads * dim * 2 * 64 * 4
    assert "fits" not in facts
    assert run("--model", "retriever", "--context", 64, "--bandwidth", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == AutoConfig.from_pretrained(retriever.PATH).model_type


def test_the_bandwidth_is_measured(
    config: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lkv.cli.plan.measure_bandwidth", lambda device: {"cpu": 8e9}[device])
    assert run("--model", config, "--context", 64, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["eviction"]["bandwidth"] == 8e9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--context 0", "lkv plan: expected --context >= 1, got 0"),
        ("--context 8 --batch 0", "lkv plan: expected --batch >= 1, got 0"),
        ("--context 8 --page 0", "lkv plan: expected pages of a power of two of rows, got 0"),
        ("--context 8 --page 48", "lkv plan: expected pages of a power of two of rows, got 48"),
        ("--context 8 --retention 0", "lkv plan: expected --retention in (0, 1], got 0.0"),
        ("--context 8 --retention 1.5", "lkv plan: expected --retention in (0, 1], got 1.5"),
        ("--context 8 --bandwidth 0", "lkv plan: expected --bandwidth > 0, got 0.0"),
        ("--context 8 --dtype int8", "expected a floating-point dtype of torch for --dtype, got 'int8'"),
        ("--context 8 --weights 1GB", "lkv plan: expected --memory with --weights, got none"),
        ("--context 8 --memory 1KB --bandwidth 1", "expected --memory for more than the weights of"),
    ],
)
def test_wrong_options(options: str, message: str, config: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--model", config, *options.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("part", [False, True], ids=["whole", "of the text"])
def test_weights_of_a_quantised_model_are_not_guessed(
    part: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = {**MODEL, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    if part:
        vision = dict(model_type="clip_vision_model", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        config = {"model_type": "llava", "text_config": config, "vision_config": vision}
        config["architectures"] = ["LlavaForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--model", tmp_path, "--context", 8, "--bandwidth", 1, "--memory", "1GB"]
    assert run(*options) == 2
    assert "expected --weights SIZE for a model that is quantised" in capsys.readouterr().err
    assert run(*options, "--weights", "1MB") == 0


@pytest.mark.parametrize("name", ["nowhere/nothing", "config.json", "{}"])
def test_models_that_are_not_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    name = str(tmp_path / name) if name.endswith("json") else name
    assert run("--model", name, "--context", 8) == 2
    assert "lkv.models.config: expected a model that transformers knows, got" in capsys.readouterr().err


def test_a_gguf_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--model", tmp_path / "x.gguf", "--context", 8) == 2
    assert "x.gguf" in capsys.readouterr().err


def test_sizes() -> None:
    assert [_bytes(n) for n in (1023, 1024, 1 << 20, (3 << 30) + (1 << 29))] == [
        "1,023 B", "1.00 KiB", "1.00 MiB", "3.50 GiB"
    ]  # fmt: skip
    found = [size(text) for text in ("80GB", "24GiB", "1.5 kb", "7", "2T", "1MiB")]
    assert found == [80 * 10**9, 24 << 30, 1500, 7, 2 * 10**12, 1 << 20]
    for text in ("", "GB", "-1GB", "1XB", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size"):
            size(text)
