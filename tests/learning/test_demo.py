"""The demo: what it prints about a model and one question, and which options make sense. `test_retriever` runs it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv import demo, tasks
from lkv.evaluate import plots
from lkv.evaluate.run import Result
from lkv.policies.lkv.checkpoint import Design, Shape


@pytest.fixture
def samples() -> list[tasks.Sample]:
    return [tasks.make(task, i, 128, split="validation") for i in range(2) for task in tasks.RETRIEVAL]


def result(sample: tasks.Sample, method: str, score: float, kept: float, text: str) -> Result:
    return Result(sample.task, sample.index, method, 0.15, score, kept, text, 0.0)


def test_options() -> None:
    given = demo.parse([])
    assert (given.tokens, given.samples, given.retention, given.out) == (1024, 8, 0.15, Path("build/demo"))
    given = demo.parse(["--tokens=128", "--samples=1", "--retention=1", "--device=cpu"])
    assert (given.tokens, given.samples, given.retention, given.device) == (128, 1, 1.0, "cpu")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tokens=127", "expected at least 128 tokens, got 127"),
        ("--samples=0", "expected at least 1 sample, got 0"),
        ("--retention=0", "expected a retention in (0, 1], got 0.0"),
        ("--retention=1.01", "expected a retention in (0, 1], got 1.01"),
    ],
)
def test_options_out_of_range_are_refused(option: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main([option])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_example_is_a_question_of_two_values_and_prints_bytes(
    samples: list[tasks.Sample], model: PreTrainedModel
) -> None:
    """3 layers of 2 KV heads of 16 numbers, 4 bytes each, for keys and values of 129 tokens: 96.75 KiB."""
    requests = next(s for s in samples if s.task == "multi_query")
    other = next(s for s in samples if s.task == "multi_query" and s.index == 1)
    results = demo.example(
        [
            result(requests, "full", 1.0, 1.0, "both"),
            result(other, "full", 1.0, 1.0, "of no interest"),
            result(requests, "lkv", 0.5, 0.25, "one of them"),
            result(samples[0], "lkv", 1.0, 0.25, "of no interest"),
        ],
        samples,
        model,
    )
    assert [" ".join(line.split()) for line in results.splitlines() if line] == [
        " ".join(["...", *requests.context.split()[-24:]]),
        f"{requests.question} {requests.answer}",
        "full 97 KiB of keys and values: both right",
        "lkv 24 KiB of keys and values: one of them 50% right",
    ]
    half = demo.example([result(requests, "full", 1.0, 1.0, "")], samples, model.to(torch.bfloat16))
    assert "    48 KiB" in half


def test_model_is_described(model: PreTrainedModel) -> None:
    results = demo.describe(model, Namespace(tokens=300))
    assert "3 layers, 2 KV heads of 16" in results and "texts of 300 tokens" in results
    assert (
        f"{model.num_parameters() / 1e6:.1f} million parameters" in results and f"torch {torch.__version__}" in results
    )


def test_it_evaluates_the_validation_split_and_draws(
    samples: list[tasks.Sample],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Text by text over all tasks; the test split stays untouched."""
    torch.manual_seed(5)
    lkv = Design(hidden=8).build(Shape.of(model))
    requests = []

    def evaluate(model: object, tokenizer: object, group: list, methods: list, setting: object) -> list[Result]:
        requests.append((group, [m.name for m in methods], setting))
        return [result(s, m.name, 1.0, 0.2, "") for m in methods for s in group]

    monkeypatch.setattr(demo.retriever, "load", lambda: (model, tokenizer))
    monkeypatch.setattr(demo, "load", lambda path, of: lkv)
    monkeypatch.setattr(demo, "evaluate", evaluate)
    drawn, draw = [], plots.draw
    monkeypatch.setattr(plots, "draw", lambda report, folder: drawn.append(report) or draw(report, folder))
    options = ["--samples=2", "--tokens=128", "--retention=0.2", "--device=cpu", f"--out={tmp_path / 'out'}"]
    assert demo.main(options) == 0
    assert [group for group, _, _ in requests] == [[s for s in samples if s.task == task] for task in tasks.RETRIEVAL]
    assert all(names == ["full", "lkv", "snapkv", "streaming_llm"] for _, names, _ in requests)
    assert all((tuple(s.retentions), s.batch, s.see_question) == ((0.2,), 8, False) for _, _, s in requests)
    printed = capsys.readouterr().out
    assert "| streaming_llm | 0.15 " in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["accuracy.png", "budgets.png", "kept.png"]
    shares = torch.tensor(drawn[0]["shares"]["0.2"])
    assert shares.shape == (3, 2) and shares.mean().item() == pytest.approx(round(0.2 * 128) / 128)
    demo.main([*options, "--samples=1"])
    assert requests[-1][2].batch == 1
