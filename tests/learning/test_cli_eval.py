"""`lkv eval`: the options of the command line decide what is evaluated, and the report has it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import cli, policies, retriever, tasks
from lkv.cli import eval as command
from lkv.cli import models
from lkv.evaluate import metrics
from lkv.evaluate.methods import FULL, Method
from lkv.evaluate.results import FILE
from lkv.evaluate.run import Result, Setting, digest
from lkv.policies.lkv import Learned, packaged
from lkv.policies.lkv.checkpoint import Design, Shape, save

HEURISTICS = ["random", "streaming_llm", "snapkv", "adakv", "kvzip"]
GRID = ["uniform+kvzip", "uniform+lkv-t", "lkv-h+snapkv", "lkv-h+kvzip"]


@dataclass
class Requests:
    """The arguments of `evaluate`, call by call."""

    samples: list[list[tasks.Sample]] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    methods: list[Sequence[Method]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [method.name for method in self.methods[0]]


@pytest.fixture
def requests(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Requests:
    """Nothing is evaluated: every method is right in every second sample."""
    requests = Requests()

    def evaluate(
        model: object, tokenizer: object, samples: list[tasks.Sample], methods: Sequence[Method], setting: Setting
    ) -> list[Result]:
        requests.samples.append(list(samples))
        requests.settings.append(setting)
        requests.methods.append(methods)
        return [
            Result(s.task, s.index, m.name, r, s.index % 2, r, "", 0.0, digest=digest(s))
            for m in methods
            for r in ([1.0] if m.name == FULL else setting.retentions)
            for s in samples
        ]

    monkeypatch.setattr(command, "evaluate", evaluate)
    monkeypatch.setattr(retriever, "load", lambda: (model, tokenizer))
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "none")
    return requests


def run(*options: object) -> int:
    return cli.main(["eval", *map(str, options)])


@pytest.fixture
def checkpoint(model: PreTrainedModel, tmp_path: Path) -> Path:
    torch.manual_seed(5)
    design, shape = Design(hidden=8), Shape.of(model)
    save(tmp_path / "lkv", design.build(shape), design, shape, {})
    return tmp_path / "lkv"


SHORT = ("--samples", 2, "--length", 96)


def test_by_default(requests: Requests, capsys: pytest.CaptureFixture) -> None:
    assert (command.parse([]).samples, command.parse([]).length) == (300, 1024)
    assert run("--samples", 2) == 0
    assert [[s.task for s in group] for group in requests.samples] == [[task] * 2 for task in tasks.RETRIEVAL]
    assert requests.names == [FULL, "floor", *HEURISTICS]
    setting = requests.settings[0]
    assert setting.retentions == (0.05, 0.1, 0.15, 0.3)
    assert (setting.see_question, setting.batch, setting.limit) == (False, 16, 24)
    assert all(other is setting for other in requests.settings)
    sample = requests.samples[1][1]
    assert sample == tasks.make("multi_key", 1, 1024, split="test")
    assert setting.metric(sample.answer, sample) == 1
    evidence = max(s.evidence_tokens for group in requests.samples for s in group)
    printed = capsys.readouterr().out
    assert f"question not seen by the compression; 10 texts of 1024 tokens, evidence of at most {evidence}" in printed


def test_options_reach_what_they_are_for(requests: Requests, capsys: pytest.CaptureFixture) -> None:
    options = ["--tasks", "key_value", "variable_tracking", "--split", "validation", "--batch", 3, "--see-question"]
    assert run(*SHORT, *options, "--answer-tokens", 7, "--retentions", 0.2, 1, "--methods", "snapkv", FULL) == 0
    assert requests.samples == [
        [tasks.make(task, i, 96, split="validation") for i in range(2)] for task in ("key_value", "variable_tracking")
    ]
    setting = requests.settings[0]
    assert (setting.retentions, setting.see_question, setting.batch, setting.limit) == ((0.2, 1.0), True, 3, 7)
    assert requests.names == ["snapkv", FULL]
    assert "question seen by the compression; 4 texts of 96 tokens" in capsys.readouterr().out


def test_methods_with_a_checkpoint(requests: Requests, checkpoint: Path) -> None:
    run(*SHORT, "--checkpoint", checkpoint)
    assert requests.names == [FULL, "floor", *HEURISTICS, "lkv"]
    assert isinstance(requests.methods[0][-1].policy, Learned)
    requests.methods.clear()
    odd = checkpoint.rename(checkpoint.with_name("of=mine"))
    run(*SHORT, "--checkpoint", odd, "--grid", "--variants", f"b={odd}", f"mine={odd}")
    assert requests.names == [FULL, "floor", *HEURISTICS, "lkv", *GRID, "b", "mine"]


def test_a_grid_needs_shares(
    requests: Requests, checkpoint: Path, model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Biases of a competition are none for the scores of other methods."""
    design = Design(budget="threshold", hidden=8)
    save(tmp_path / "threshold", design.build(Shape.of(model)), design, Shape.of(model), {})
    assert run(*SHORT, "--checkpoint", tmp_path / "threshold", "--grid") == 2
    assert "expected beside --grid a checkpoint or a variant with fixed shares" in capsys.readouterr().err
    assert run(*SHORT, "--checkpoint", tmp_path / "threshold", "--grid", "--variants", f"fixed={checkpoint}") == 0
    assert requests.names == [FULL, "floor", *HEURISTICS, "lkv", *GRID, "fixed"]


def test_all_methods_by_one_word(requests: Requests, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    """Those of the default first, then every other name; those of a grid beside them."""
    others = [name for name in policies.names() if name not in HEURISTICS]
    assert run(*SHORT, "--policies", "all") == 0
    assert requests.names == [FULL, "floor", *HEURISTICS, *others]
    requests.methods.clear()
    assert run(*SHORT, "--methods", "all", "--checkpoint", checkpoint, "--grid") == 0
    assert requests.names == [FULL, "floor", *HEURISTICS, *others, "lkv", *GRID]
    assert run(*SHORT, "--policies", "all", "snapkv") == 2
    assert "expected --methods all alone, got all snapkv" in capsys.readouterr().err


def test_the_retriever_comes_with_its_checkpoint_and_other_models_without(
    requests: Requests, checkpoint: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "package")
    shutil.copytree(checkpoint, tmp_path / "package" / "retriever")
    run(*SHORT)
    assert requests.names[-1] == "lkv"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    requests.methods.clear()
    run("--samples", 1, "--length", 200, "--model", tmp_path / "model", "--device", "cpu")
    assert "lkv" not in requests.names
    # Their questions are in English, by their own tokenizer.
    context = requests.samples[-1][0].context
    assert "The special number of" in context and 150 < len(tokenizer(context).input_ids) <= 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--retentions", "0"], "expected retentions in (0, 1], got 0.0"),
        (["--retentions", "0.5", "1.5"], "expected retentions in (0, 1], got 1.5"),
        (["--retentions", "nan"], "expected retentions in (0, 1], got nan"),
        (["--samples", "0"], "expected samples and batch >= 1"),
        (["--batch", "0"], "expected samples and batch >= 1"),
        (["--answer-tokens", "0"], "expected answer tokens >= 1, got 0"),
        (["--methods", "full", "snapkv", "full"], "expected --methods without repetitions, got full more than once"),
        (["--retentions", "0.3", "0.30"], "expected --retentions without repetitions, got 0.3 more than once"),
        (["--tasks", "single", "single"], "expected --tasks without repetitions, got single more than once"),
        (["--format", "ruler"], "expected --file beside --format, got none"),
        (["--file", "x.jsonl"], "expected --format beside --file, got none"),
        (["--file", "x", "y", "x", "--format", "ruler"], "expected --file without repetitions, got x more than once"),
        (["--soft", "--see-question"], "made texts and a question not seen, got --see-question beside it"),
        (["--soft", "--file", "x", "--format", "ruler"], "made texts and a question not seen, got --file beside it"),
        (["--variants", "x"], "expected variants NAME=PATH, got 'x'"),
        (
            ["--methods", "lkv"],
            "methods of full, floor, random, streaming_llm, snapkv, adakv, kvzip, lava, ",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    requests: Requests, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(*SHORT, *options) == 2
    assert message in capsys.readouterr().err
    assert not requests.settings


def test_progress_is_counted_in_samples(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(command.tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(command, "tqdm", Bar)
    for methods in (["snapkv", FULL], [FULL, "snapkv"]):
        run(*SHORT, "--tasks", "single", "multi_key", "--methods", *methods, "--retentions", 0.5, 0.2)
    assert [(bar.total, bar.n) for bar in bars] == [(4, 4), (4, 4)]


class TestFiles:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        """Two tasks of RULER, whose answers have other lengths."""
        paths = [tmp_path / "niah_single.jsonl", tmp_path / "qa_1.jsonl"]
        for path in paths:
            lines = [{"input": f"Text {i}.\nWhat is it? SAY it", "outputs": ["Paris", "Rome"]} for i in range(3)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return paths

    def test_are_scored_and_limited_as_their_benchmark_does(self, requests: Requests, paths: list[Path]) -> None:
        assert run("--file", *paths, "--format", "ruler", "--samples", 2) == 0
        assert [[(s.task, s.index) for s in group] for group in requests.samples] == [
            [("niah_single", 0), ("niah_single", 1)], [("qa_1", 0), ("qa_1", 1)],
        ]  # fmt: skip
        assert [setting.limit for setting in requests.settings] == [128, 32]
        assert [s.metric("paris", group[0]) for s, group in zip(requests.settings, requests.samples, strict=True)] == [
            0.5,
            1,
        ]
        requests.settings.clear()
        run("--file", *paths, "--format", "ruler", "--answer-tokens", 5)
        assert [setting.limit for setting in requests.settings] == [5, 5]

    def test_marker_and_split_are_handed_on(
        self, requests: Requests, paths: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert run("--file", paths[0], "--format", "ruler", "--question-marker", "SAY") == 0
        assert requests.samples[0][0].question == "SAY it"
        own, seen = command.files.load, []
        monkeypatch.setattr(
            command.files, "load", lambda *args, **more: seen.append((args, more)) or own(*args, **more)
        )
        run("--file", paths[0], "--format", "ruler", "--split", "validation")
        assert seen == [
            (("ruler", str(paths[0])), {"count": 300, "split": "validation", "prompts": None, "marker": None})
        ]

    def test_packages_are_looked_for_before_anything_runs(
        self, requests: Requests, paths: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        def missing(samples: Sequence[tasks.Sample]) -> None:
            assert len(samples) == 6
            raise metrics.need("no_such", "longbench", "ROUGE-L")

        monkeypatch.setattr(metrics, "check_packages", missing)
        assert run("--file", *paths, "--format", "ruler") == 2
        assert "pip install 'lkv-ext[longbench]'" in capsys.readouterr().err and not requests.samples


def test_report_has_what_was_run(requests: Requests, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run(*SHORT, "--tasks", "single", "--see-question", "--out", out, "--split", "train", "--device", "cpu") == 0
    report = json.loads((out / "report.json").read_text())
    facts = report["facts"]
    assert facts["question_seen"] is True and facts["split"] == "train" and facts["tasks"] == ["single"]
    assert (facts["model"], facts["length"], facts["samples"], facts["device"]) == ("retriever", 96, 2, "cpu")
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["format"] is facts["prompts"] is None
    assert {row["score"] for row in report["rows"]} == {0.5} and len(report["rows"]) == 1 + 6 * 4
    assert "kept_positions" not in report
    assert str(out / "accuracy.png") in capsys.readouterr().out


class TestGoingOn:
    OPTIONS = (*SHORT, "--tasks", "single", "multi_key", "--retentions", 0.2, 0.5)

    def test_what_is_there_is_not_computed_again(self, requests: Requests, tmp_path: Path) -> None:
        """Methods and samples may be added; what the report shows is what one run would have made."""
        out = tmp_path / "out"
        assert run(*self.OPTIONS, "--methods", FULL, "snapkv", "--out", out) == 0
        report = (out / "report.json").read_text()
        requests.samples.clear()
        assert run(*self.OPTIONS, "--methods", FULL, "snapkv", "--out", out) == 0
        assert requests.samples == [[], []] and (out / "report.json").read_text() == report
        requests.methods.clear()
        more = ("--samples", 3, "--methods", FULL, "snapkv", "random")
        assert run(*self.OPTIONS, "--methods", FULL, "snapkv", "random", "--out", out) == 0
        assert [[m.name for m in methods] for methods in requests.methods] == [["random"], ["random"]]
        requests.samples.clear()
        assert run(*self.OPTIONS, *more, "--out", out) == 0
        assert [[s.index for s in group] for group in requests.samples] == [[2], [2]]
        grown = json.loads((out / "report.json").read_text())
        assert run(*self.OPTIONS, *more, "--out", tmp_path / "at once") == 0
        assert grown == json.loads((tmp_path / "at once" / "report.json").read_text())

    def test_an_interrupted_run_leaves_its_results_and_a_report_of_the_tasks_that_are_done(
        self, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, out = command.evaluate, tmp_path / "out"

        def interrupted(model: object, tokenizer: object, samples: list[tasks.Sample], *rest: object) -> Iterator:
            found = own(model, tokenizer, samples, *rest)
            yield from found if samples[0].task == "single" else found[:3]
            if samples[0].task != "single":
                raise KeyboardInterrupt

        monkeypatch.setattr(command, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*self.OPTIONS, "--methods", "snapkv", "random", "--out", out)
        assert len((out / FILE).read_text().splitlines()) == 8 + 3
        rows = json.loads((out / "report.json").read_text())["rows"]
        assert len(rows) == 4 and all(list(row["tasks"]) == ["single"] for row in rows)
        monkeypatch.setattr(command, "evaluate", own)
        requests.samples.clear()
        assert run(*self.OPTIONS, "--methods", "snapkv", "random", "--out", out) == 0
        assert [len(group) for group in requests.samples] == [0, 2]
        assert len((out / FILE).read_text().splitlines()) == 16  # none twice

    @pytest.mark.parametrize("other", [["--see-question"], ["--answer-tokens", "3"], ["--dtype", "bfloat16"]])
    def test_results_of_other_settings_are_refused(
        self, requests: Requests, other: list[str], tmp_path: Path, capsys: pytest.CaptureFixture,
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        assert run(*SHORT, "--tasks", "single", "--methods", FULL, "--out", tmp_path) == 0
        monkeypatch.setattr(command.models, "load", lambda options: (
            copy.deepcopy(model).to(getattr(torch, options.dtype or "float32")), tokenizer, tasks.Words()
        ))  # fmt: skip
        assert run(*SHORT, "--tasks", "single", "--methods", FULL, "--out", tmp_path, *other) == 2
        assert f"lkv eval: expected the results in {tmp_path} to be of this run" in capsys.readouterr().err


def test_pictures_of_a_checkpoint_are_of_the_sample_in_the_middle(
    requests: Requests, checkpoint: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    options = ["--tasks", "single", "multi_key", "--retentions", 0.2, 0.5, "--methods", FULL, "lkv"]
    assert run(*SHORT, "--checkpoint", checkpoint, *options, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kept = report["kept_positions"]
    assert kept["title"].startswith("multi_key: positions kept at 15%") and kept["length"] == 97
    assert sum(len(head["positions"]) for head in kept["heads"]) == 6 * round(0.15 * 97)
    assert list(report["shares"]) == ["0.2", "0.5"]
    for retention, rows in (("0.2", 19), ("0.5", 48)):
        shares = torch.tensor(report["shares"][retention], dtype=torch.float64)
        assert shares.shape == (3, 2) and shares.sum().item() * 97 == pytest.approx(6 * rows)


def test_relaxed_mask_beside_eviction(
    requests: Requests, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []

    def soft(model: object, tokenizer: object, samples: list, policy: object, *rest: object) -> float:
        seen.append((len(samples), isinstance(policy, Learned), *rest))
        return 0.75

    monkeypatch.setattr(command, "soft_accuracy", soft)
    options = ["--batch", 5, "--answer-tokens", 9, "--retentions", 0.2, 0.5, "--soft", "--out", tmp_path / "out"]
    assert run(*SHORT, "--tasks", "single", "--checkpoint", checkpoint, *options) == 0
    assert seen == [(2, True, 0.2, 5, 9), (2, True, 0.5, 5, 9)]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["soft_to_hard"] == {"0.2": [0.75, 0.5], "0.5": [0.75, 0.5]}
    assert "at 0.2: 75.0 through the relaxed mask, 50.0 after eviction" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_models(
    dtype: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Requests, tmp_path: Path
) -> None:
    options = command.parse(["--device", "cpu", *(["--dtype", dtype] if dtype else [])])
    read, _, language = models.load(options)
    assert read.dtype == (torch.bfloat16 if dtype else torch.float32) and isinstance(language, tasks.Words)

    model.to(torch.float64).train().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options.model = str(tmp_path / "model")
    read, words, language = models.load(options)
    assert read.dtype == (torch.bfloat16 if dtype else torch.float64)  # as it was stored
    assert not read.training and read.device.type == "cpu" and isinstance(language, tasks.English)
    assert words("set Bala").input_ids == tokenizer("set Bala").input_ids


@pytest.mark.parametrize("methods, others", [([FULL], 0), ([FULL, "random", "snapkv"], 4 + 2), (["snapkv", FULL], 4)])
def test_a_text_is_done_when_its_last_method_is(
    requests: Requests, monkeypatch: pytest.MonkeyPatch, methods: list[str], others: int
) -> None:
    """The bar: of 2 texts, under 2 retentions save with the full cache, results come method by method."""
    steps: list[int] = []

    class Bar:
        def __init__(self, total: int, **_: object) -> None:
            assert total == 2

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            steps.append(count)

    monkeypatch.setattr(command, "tqdm", Bar)
    assert run(*SHORT, "--tasks", "single", "--retentions", 0.1, 0.2, "--methods", *methods) == 0
    assert steps[-2:] == [1, 1] and sum(steps) == 2 and len(steps) >= others
