"""`lkv eval --file`: samples out of files, scored as their benchmark does, with one line about what was compressed."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

import tiny_folder

from lkv import cli

METHODS = ["--methods", "full", "streaming_llm", "--retentions", "0.5", "--answer-tokens", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder.save(tmp_path_factory.mktemp("model")))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_ruler_and_longbench_files_are_evaluated(tmp_path, model, capsys):
    record = {"input": "One value is 12. The sky is blue.\nWhat are all the values?", "outputs": ["12"]}
    path = write(tmp_path / "niah_single.jsonl", [record] * 3)
    command = ["eval", "--model", model, "--file", path, "--format", "ruler", "--samples", "2", *METHODS]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert f"question not seen by the compression; 2 texts of {path}\n" in printed
    assert "niah_single" in printed and "| streaming_llm | 0.5 " in printed

    record = {"input": "Who?", "context": "Ann did it.", "answers": ["Ann"], "dataset": "hotpotqa"}
    path = write(tmp_path / "x.jsonl", [record])
    command = ["eval", "--model", model, "--file", path, "--format", "longbench", "--see-question", *METHODS]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "question seen by the compression; 1 texts of" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["format"] == "longbench" and report["facts"]["tasks"] == [path]


def test_own_prompts_are_reported_and_others_may_be_given(tmp_path, model, capsys):
    record = {"input": "Who?", "context": "Ann did it.", "answers": ["Ann"], "dataset": "hotpotqa"}
    command = ["eval", "--model", model, "--file", write(tmp_path / "x.jsonl", [record]), "--format", "longbench"]
    assert cli.main([*command, *METHODS]) == 0
    assert "prompts in our own wording" in capsys.readouterr().out
    prompts = tmp_path / "dataset2prompt.json"
    prompts.write_text(json.dumps({"hotpotqa": "{context}\n{input}"}))
    assert cli.main([*command, *METHODS, "--prompts", str(prompts)]) == 0
    assert "wording" not in capsys.readouterr().out
    prompts.write_text("[]")
    assert cli.main([*command, *METHODS, "--prompts", str(prompts)]) == 2
    assert "expected prompts by subset" in capsys.readouterr().err


def test_what_is_wrong_with_a_file_is_one_line(tmp_path, model, capsys):
    path = write(tmp_path / "x.jsonl", [{"input": "a\nWhat is it?"}])
    assert cli.main(["eval", "--model", model, "--file", path, "--format", "ruler"]) == 2
    assert "line 1: expected the field 'outputs', a list of one or more strings" in capsys.readouterr().err
    assert cli.main(["eval", "--model", model, "--file", path]) == 2
    assert capsys.readouterr().err == "lkv eval: expected --format beside --file, got none\n"
