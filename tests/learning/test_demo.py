"""The demos: which one is shown, what is printed about a text and its answers, and which options make sense.

`test_retriever` and `test_smollm2` run them on the real models.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_folder
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lkv import models, tasks
from lkv.compression import prefill
from lkv.demo import __main__ as command
from lkv.demo import pretrained, retriever
from lkv.demo.machine import describe
from lkv.evaluate import plots
from lkv.evaluate.forks import Forks
from lkv.evaluate.methods import Method
from lkv.evaluate.run import Result
from lkv.extras import MissingPackage
from lkv.learn.dialogue import exchange
from lkv.policies.lkv import packaged
from lkv.policies.lkv.checkpoint import Design, Shape, save
from lkv.policies.lkv.fingerprint import fingerprint
from lkv.policies.snapkv import SnapKV


@pytest.fixture
def samples() -> list[tasks.Sample]:
    return [tasks.make(task, i, 128, split="validation") for i in range(2) for task in tasks.RETRIEVAL]


def result(sample: tasks.Sample, method: str, score: float, kept: float, text: str) -> Result:
    return Result(sample.task, sample.index, method, 0.15, score, kept, text, 0.0)


def test_options() -> None:
    given = command.parse([])
    assert (given.model, given.tokens, given.samples, given.retention) == ("smollm2", None, 8, 0.15)
    assert (given.text, given.seed, given.out) == (pretrained.ESSAY, 0, Path("build/demo"))
    given = command.parse(["--tokens=128", "--samples=1", "--retention=1", "--device=cpu"])
    assert (given.tokens, given.samples, given.retention, given.device) == (128, 1, 1.0, "cpu")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tokens=127", "expected at least 128 tokens, got 127"),
        ("--tokens=0", "expected at least 128 tokens, got 0"),
        ("--samples=0", "expected at least 1 sample, got 0"),
        ("--retention=0", "expected a retention in (0, 1], got 0.0"),
        ("--retention=1.01", "expected a retention in (0, 1], got 1.01"),
        ("--text=nowhere.txt", "expected a file of plain text, got nowhere.txt"),
    ],
)
def test_options_out_of_range_are_refused(option: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([option])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_model_is_described(model: PreTrainedModel) -> None:
    text = describe(model.bfloat16(), "mine")
    assert "mine: " in text and "3 layers, 2 KV heads of 16, bfloat16" in text
    assert f"{model.num_parameters() / 1e6:.1f} million parameters" in text and f"torch {torch.__version__}" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, and a checkpoint for it."""
    folder = tiny_folder.save(tmp_path_factory.mktemp("model"))
    tiny = AutoModelForCausalLM.from_pretrained(folder)
    design = Design(hidden=8, budget="threshold", scale="absolute")
    save(folder / "lkv", design.build(Shape.of(tiny)), design, Shape.of(tiny), {}, fingerprint(tiny))
    return folder


class TestPretrained:
    def asker(self, folder: Path) -> pretrained.Asker:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        text = pretrained.weave(tokenizer, pretrained.ESSAY, 600, 0)
        talk = exchange(tokenizer, text, 0)
        ids = torch.tensor([talk.context])
        whole = prefill(model, ids, needs=SnapKV().needs, window=SnapKV().window)
        forks = Forks(model, tokenizer, whole, ids, clock=pretrained.clock, begin=talk.protected)
        return pretrained.Asker(forks, talk, text.facts)

    def test_every_method_answers_every_question(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        options = [f"--model={folder}", "--tokens=700", "--retention=0.2", "--device=cpu", f"--out={tmp_path}"]
        assert command.main([*options, f"--checkpoint={folder / 'lkv'}"]) == 0
        printed = capsys.readouterr().out
        statements = re.findall(r"^  (\S.*\.)$", printed, re.MULTILINE)
        assert len(statements) == 4
        names = ["full", "lkv", "kvzip", "snapkv"]
        assert re.findall(r"^(\w+): (\d+)% of the rows", printed, re.MULTILINE) == [
            (name, "100" if name == "full" else "20") for name in names
        ]
        assert len(re.findall(r"^  (?:right|wrong)  ", printed, re.MULTILINE)) == 4 * len(names)
        assert re.findall(r"^(\w+) +\d+% .* ms +[0-4] of 4$", printed, re.MULTILINE) == names
        assert f"{tmp_path / 'page.html'}: what lkv and kvzip keep" in printed
        page = re.search(r'type="application/json">(.*?)</script>', (tmp_path / "page.html").read_text(), re.DOTALL)
        data = json.loads(page[1])
        assert (data["title"], data["model"], data["retention"]) == ("essay", folder.name, 0.2)
        assert all(statement in "".join(data["units"]) for statement in statements)
        assert [x["name"] for x in data["methods"]] == ["lkv", "kvzip"]
        assert all(f"  {answer}\n" in printed for x in data["methods"] for answer in x["answers"])
        assert command.main(options) == 0
        printed = capsys.readouterr().out
        assert "no checkpoint of LKV" in printed and "\nlkv" not in printed and "\nkvzip" in printed

    def test_facts_are_in_the_text_and_depend_on_the_seed(self, folder: Path, tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        made = pretrained.weave(tokenizer, pretrained.ESSAY, 1500, 0)
        assert len(made.facts) == 4 and all(made.text.count(fact.statement) == 1 for fact in made.facts)
        assert 1400 < len(tokenizer(made.text).input_ids) <= 1500
        assert pretrained.weave(tokenizer, pretrained.ESSAY, 1500, 1).facts != made.facts
        (tmp_path / "other.txt").write_text("A short text.")
        with pytest.raises(ValueError, match="expected a file of more than"):
            pretrained.weave(tokenizer, tmp_path / "other.txt", 1500, 0)

    def test_right_is_an_answer_with_the_value_and_bytes_are_counted(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        """2 layers of 2 KV heads of 8 numbers for keys and as many for values, 4 bytes each."""
        asker = self.asker(folder)
        values = [fact.value for fact in asker.facts]
        answers = iter([f" {values[0]}.", " nothing", f" not {values[2]}", values[3][1:]])
        monkeypatch.setattr(pretrained.Asker, "reply", lambda *a: next(answers))
        found = asker.judge(Method("snapkv", SnapKV()), 0.25)
        row, length = 2 * 2 * 2 * 8 * 4, len(asker.talk.context)
        assert found.nbytes == round(0.25 * length) * row and found.right == 2
        assert found.kept == found.nbytes / (length * row)
        assert found.second_pass == 0 < min(found.evict, found.step)
        verdicts = re.findall(r"^  (right|wrong) ", capsys.readouterr().out, re.MULTILINE)
        assert verdicts == ["right", "wrong", "right", "wrong"]

    def test_an_answer_has_16_tokens_and_the_time_of_one_is_taken_over_12(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asker, limits, ticks = self.asker(folder), [], iter(range(100))
        made = pretrained.answer
        monkeypatch.setattr(pretrained, "answer", lambda *given: limits.append(given[4]) or made(*given))
        monkeypatch.setattr(pretrained, "clock", lambda: next(ticks))
        assert asker.judge(Method("snapkv", SnapKV()), 0.25).step == 1 / 12
        assert limits == [16] * 4 + [1, 12]

    def test_questions_do_not_see_each_other(self, folder: Path) -> None:
        """Every one is asked of the rows of the text alone, and answers are those of generation from them."""
        asker = self.asker(folder)
        model, tokenizer, ids = asker.forks.model, asker.forks.tokenizer, asker.forks.tokens
        questions = asker.talk.questions
        with asker.forks.whole.fork() as cache:
            replies = [asker.reply(cache, question) for question in (*questions, questions[0])]
            assert cache.get_seq_length() == ids.shape[1]
        assert replies[0] == replies[-1]
        asked = torch.cat([ids, torch.tensor([questions[1]])], 1)
        written = model.generate(asked, max_new_tokens=pretrained.LIMIT, do_sample=False, pad_token_id=0)
        assert replies[1] == tokenizer.decode(written[0, asked.shape[1] :], skip_special_tokens=True)

    def test_without_its_package_the_retriever_is_shown(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        load, shown = models.load, []

        def missing(name: str, **more: object) -> object:
            if name != "retriever":
                raise MissingPackage("expected the package of it; pip install it")
            return load(name, **more)

        monkeypatch.setattr(models, "load", missing)
        monkeypatch.setattr(retriever, "show", lambda *given: shown.append(given))
        assert command.main(["--device=cpu"]) == 0
        ((_, _, lkv, options),) = shown
        assert (options.model, options.tokens) == ("retriever", 1024) and lkv is not None
        printed = capsys.readouterr().out
        assert printed.startswith("expected the package of it; pip install it\nWithout it, the demo shows the retriev")


class TestRetriever:
    def test_example_is_a_question_of_two_values_and_prints_bytes(
        self, samples: list[tasks.Sample], model: PreTrainedModel
    ) -> None:
        """3 layers of 2 KV heads of 16 numbers, 4 bytes each, for keys and values of 129 tokens: 96.75 KiB."""
        requests = next(s for s in samples if s.task == "multi_query")
        other = next(s for s in samples if s.task == "multi_query" and s.index == 1)
        results = retriever.example(
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
        half = retriever.example([result(requests, "full", 1.0, 1.0, "")], samples, model.to(torch.bfloat16))
        assert "    48 KiB" in half

    def test_it_evaluates_the_validation_split_and_draws(
        self,
        samples: list[tasks.Sample],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        """Text by text over all tasks; the test split stays untouched."""
        torch.manual_seed(5)
        requests = []
        save(tmp_path / "retriever", Design(hidden=8).build(Shape.of(model)), Design(hidden=8), Shape.of(model), {})

        def evaluate(model: object, tokenizer: object, group: list, methods: list, setting: object) -> list[Result]:
            requests.append((group, [m.name for m in methods], setting))
            return [result(s, m.name, 1.0, 0.2, "") for m in methods for s in group]

        monkeypatch.setattr(models, "load", lambda name, device: (model, tokenizer))
        monkeypatch.setattr(packaged, "FOLDER", tmp_path)
        monkeypatch.setattr(retriever, "evaluate", evaluate)
        drawn, draw = [], plots.draw
        monkeypatch.setattr(plots, "draw", lambda report, folder: drawn.append(report) or draw(report, folder))
        options = ["--model=retriever", "--samples=2", "--tokens=128", "--retention=0.2", "--device=cpu"]
        options.append(f"--out={tmp_path / 'out'}")
        assert command.main(options) == 0
        assert [group for group, _, _ in requests] == [
            [s for s in samples if s.task == task] for task in tasks.RETRIEVAL
        ]
        assert all(names == ["full", "lkv", "snapkv", "streaming_llm"] for _, names, _ in requests)
        assert all((tuple(s.retentions), s.batch, s.see_question) == ((0.2,), 8, False) for _, _, s in requests)
        printed = capsys.readouterr().out
        assert "texts of 128 tokens" in printed and "| streaming_llm | 0.15 " in printed
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "accuracy.png",
            "budgets.png",
            "kept.png",
        ]
        shares = torch.tensor(drawn[0]["shares"]["0.2"])
        assert shares.shape == (3, 2) and shares.mean().item() == pytest.approx(round(0.2 * 128) / 128)
        command.main([*options, "--samples=1"])
        assert requests[-1][2].batch == 1
