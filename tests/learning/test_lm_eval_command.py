"""`lkv lm-eval`: its options reach the harness, each policy is judged at each retention, and the report has it all."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface")

import lm_eval
import lm_eval.tasks
import lm_eval.utils
import tiny_folder
import torch

from lkv import cli
from lkv.cli import lm_eval as command
from lkv.evaluate import harness
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv import Learned, packaged
from lkv.policies.lkv.checkpoint import Design, Shape, save
from lkv.policies.snapkv import SnapKV
from lkv.policies.streaming_llm import StreamingLLM

TEXT = "The grass is green, the sky is blue, and the sun is yellow, as everyone knows who ever looked out of a window."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def judged(folder, monkeypatch):
    """The calls of the harness, model by model, and whether the model was closed; nothing is evaluated."""
    seen = []

    def evaluate(model, **options):
        seen.append(SimpleNamespace(model=model, options=options, closed=False))
        monkeypatch.setattr(model, "close", lambda: setattr(seen[-1], "closed", True))
        model.totals.prompts = len(seen)
        return {"results": {"any": {"acc": 0.5}}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    monkeypatch.setattr(lm_eval.utils, "make_table", lambda results: f"a table of {len(results)}")
    monkeypatch.setattr(command, "_tasks", lambda options: "the manager")

    def run(*options):
        seen.clear()
        given = ["lm-eval", "--model", str(folder), "--device", "cpu", "--tasks", "any", *map(str, options)]
        assert cli.main(given) == 0
        return list(seen)

    return run


def test_by_default(judged):
    full, snapkv = judged()
    assert full.model.compression == harness.Compression(None, 1.0, False, 64, None)
    assert snapkv.model.compression == harness.Compression(SnapKV(), 0.15, False, 64, None)
    assert snapkv.model.max_length == 1024  # what the model is made for
    assert snapkv.options == {
        "tasks": ["any"], "task_manager": "the manager", "num_fewshot": None, "limit": None, "gen_kwargs": None,
        "apply_chat_template": False, "log_samples": False,
    }  # fmt: skip
    assert full.closed and snapkv.closed


def test_options_reach_the_harness(judged):
    (requests,) = judged(
        "--policies", "streaming", "--num-fewshot", 3, "--limit", 7, "--gen-kwargs", "temperature=0",
        "--apply-chat-template", "--max-length", 99, "--retentions", 1,
    )  # fmt: skip
    wanted = {"num_fewshot": 3, "limit": 7, "gen_kwargs": "temperature=0", "apply_chat_template": True}
    assert wanted.items() <= requests.options.items()
    assert requests.model.max_length == 99 and requests.model.compression.policy == StreamingLLM()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--see-question"], {"see_question": True}),
        (["--question-tokens", 5], {"question_tokens": 5}),
        (["--question-marker", "Q:"], {"marker": "Q:"}),
    ],
)
def test_what_is_compressed_follows_the_options(judged, options, wanted):
    for requests in judged(*options):
        how = requests.model.compression
        assert how == harness.Compression(how.policy, how.retention, **wanted)


def test_every_policy_at_every_retention_and_the_full_cache_once(judged, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    runs = judged("--policies", "kvzip", "full", "streaming", "--retentions", 0.5, 0.25, "--see-question", "--out", out)
    answers_now = [(requests.model.compression.policy, requests.model.compression.retention) for requests in runs]
    assert answers_now == [(KVzip(), 0.5), (KVzip(), 0.25), (None, 1.0), (StreamingLLM(), 0.5), (StreamingLLM(), 0.25)]
    report = json.loads(out.read_text())
    assert report["facts"]["tasks"] == ["any"] and report["facts"]["lm_eval"] == lm_eval.__version__
    assert [(x["policy"], x["retention"]) for x in report["reports"]] == [
        ("kvzip", 0.5), ("kvzip", 0.25), ("full", 1.0), ("streaming_llm", 0.5), ("streaming_llm", 0.25),
    ]  # fmt: skip
    assert [x["prompts"] for x in report["reports"]] == [1, 2, 3, 4, 5]
    assert all(x["question_seen"] and x["results"] == {"any": {"acc": 0.5}} for x in report["reports"])
    assert all(x["compressed"].startswith("question seen by the compression") for x in report["reports"])
    printed = capsys.readouterr().out
    assert "kvzip at retention 0.5; question seen" in printed and ", full; question seen" in printed
    assert printed.count("a table of 1") == 5
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]


def test_results_are_written_as_they_come(judged, tmp_path, monkeypatch):
    """A run that is interrupted leaves those before."""
    calls = []

    def evaluate(model, **options):
        calls.append(model)
        monkeypatch.setattr(model, "close", lambda: calls.append("closed"))
        if len(calls) > 2:
            raise ValueError("no more")
        return {"results": {}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    out = tmp_path / "report.json"
    with pytest.raises(AssertionError):
        judged("--policies", "full", "snapkv", "--out", out)
    assert [x["policy"] for x in json.loads(out.read_text())["reports"]] == ["full"]
    assert calls[1::2] == ["closed", "closed"]


def test_checkpoint_is_a_policy(judged, folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    design, shape = Design(hidden=8), Shape.of(model)
    save(tmp_path / "lkv", design.build(shape), design, shape, {})
    (requests,) = judged("--policies", "lkv", "--checkpoint", tmp_path / "lkv")
    assert isinstance(requests.model.compression.policy, Learned) and requests.model.compression.retention == 0.15
    (tmp_path / "lkv").rename(tmp_path / "tiny")  # which comes with the package for a model of this name
    monkeypatch.setattr(packaged, "FOLDER", tmp_path)
    options = command.parse(["--tasks", "any", "--model", "tiny", "--policies", "lkv"])
    assert isinstance(command.known(options, model)["lkv"], Learned)


def test_checkpoint_of_another_fine_tune(judged, folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    design, shape = Design(hidden=8), Shape.of(AutoModelForCausalLM.from_pretrained(folder))
    save(tmp_path / "lkv", design.build(shape), design, shape, {}, "0" * 32)
    options = ("--policies", "lkv", "--checkpoint", tmp_path / "lkv")
    with pytest.raises(AssertionError):
        judged(*options)
    assert "another fine-tune" in capsys.readouterr().err
    assert judged(*options, "--any-weights")


def test_without_the_harness_its_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["lm-eval", "--tasks", "any"]) == 2
    assert "pip install 'lkv-ext[lm-eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """A task of generation and one of choice, on a file."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [{"text": TEXT, "question": f"\nQuestion: {x}?\nAnswer:", "answer": x} for x in ("sky", "sun", "grass")]
    (folder / "documents.jsonl").write_text("".join(json.dumps(x) + "\n" for x in documents))
    data = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        "doc_to_text": "{{text}}{{question}}",
    }
    generate = {
        "task": "local_generate",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    choose = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_target": "{{['sky', 'sun', 'grass'].index(answer)}}",
        "doc_to_choice": ["sky", "sun", "grass"],
        "metric_list": [{"metric": "acc"}],
    }
    for task in (generate, choose):
        # JSON is YAML.
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**common, **task}))
    return str(folder)


def test_command_runs_tasks_and_reports_what_was_compressed(tmp_path, folder, local_tasks, capsys):
    out = tmp_path / "results" / "report.json"
    command = ["lm-eval", "--model", str(folder), "--device", "cpu", "--include-path", local_tasks]
    command += ["--tasks", "local_generate", "local_choice", "--policies", "full", "snapkv", "--retentions", "0.25"]
    assert cli.main([*command, "--question-marker", "\nQuestion:", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    outputs = "not seen by the compression: all of a prompt is compressed but what begins with the last '\\nQuestion:'"
    assert printed.count(f"question {outputs}") == 2
    assert "snapkv at retention 0.25; question" in printed
    assert "local_generate" in printed and "exact_match" in printed
    report = json.loads(out.read_text())
    full, snapkv = report["reports"]
    assert full["kept"] == full["rows"] and snapkv["rows"] == full["rows"]
    assert snapkv["kept"] / snapkv["rows"] == pytest.approx(0.25, abs=0.02)
    assert not snapkv["question_seen"] and 0 <= snapkv["results"]["local_choice"]["acc,none"] <= 1
    assert cli.main([*command, "--policies", "streaming_llm", "--see-question", "--limit", "1"]) == 0
    assert (
        "question seen by the compression: all of a prompt is compressed but its last token" in capsys.readouterr().out
    )


def test_tasks_of_the_harness_are_read_only_for_names_that_are_not_included(monkeypatch, capsys):
    made = []

    class Manager:
        def __init__(self, include_path=None, include_defaults=True):
            made.append((include_path, include_defaults))
            self.names = ["mine"] * (include_path is not None) + ["arc"] * include_defaults

        def match_tasks(self, names):
            return [name for name in names if name in self.names]

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)

    def tasks(*options):
        made.clear()
        return command._tasks(command.parse(["--tasks", *options]))

    assert tasks("mine", "--include-path", "x").names == ["mine"] and made == [("x", False)]
    assert tasks("mine", "arc", "--include-path", "x").names == ["mine", "arc"] and made == [("x", False), ("x", True)]
    assert tasks("arc").names == ["arc"] and made == [(None, True)]
    assert cli.main(["lm-eval", "--tasks", "arc", "mine", "other"]) == 2
    assert "expected names of tasks that lm-eval knows, got mine, other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--retentions", "0"], "expected retentions in (0, 1], got 0.0"),
        (["--retentions", "0.5", "1.01"], "expected retentions in (0, 1], got 1.01"),
        (["--see-question", "--question-tokens", "4"], "got --see-question and --question-tokens"),
        (["--question-marker", "a", "--question-tokens", "64"], "got --question-tokens and --question-marker"),
        (["--see-question", "--question-marker", ""], "got --see-question and --question-marker"),
        (["--question-tokens", "0"], "expected question tokens >= 1, got 0"),
        (["--question-marker", ""], "expected a question marker with at least one letter"),
        (
            ["--policies", "lkv", "--model", "of/mine"],
            "expected --checkpoint for the policy lkv and this model, got none",
        ),
        (["--policies", "best"], "expected policies of full, random, "),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert cli.main(["lm-eval", "--tasks", "any", *options]) == 2
    assert message in capsys.readouterr().err
