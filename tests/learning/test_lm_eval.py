"""lm-eval's tasks on evicted caches: the full cache gives the harness' own numbers, and what is compressed is said."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface")

import tiny_folder
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lkv import cli
from lkv.evaluate.harness import Compression, HarnessModel
from lkv.policies.kvzip import KVzip
from lkv.policies.snapkv import SnapKV
from lkv.policies.streaming_llm import StreamingLLM

TEXT = "The grass is green, the sky is blue, and the sun is yellow, as everyone knows who ever looked out of a window."
QUESTION = "\nQuestion: what is blue?\nAnswer:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def judged(loaded):
    """Makes a model for the harness, which is closed at the end."""
    made = []

    def make(policy, retention=1.0, **options):
        made.append(HarnessModel(*loaded, Compression(policy, retention, **options)))
        return made[-1]

    yield make
    for model in made:
        model.close()


def likelihoods(*continuations):
    return [Instance("loglikelihood", {}, (TEXT + QUESTION, c), i) for i, c in enumerate(continuations)]


def generation(**options):
    options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False, **options}
    return [Instance("generate_until", {}, (text + QUESTION, options), i) for i, text in enumerate([TEXT, TEXT[:50]])]


@pytest.mark.parametrize("policy", [None, SnapKV(), StreamingLLM()], ids=str)
def test_nothing_evicted_gives_what_the_harness_itself_does(loaded, judged, policy):
    plain = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=1)
    ours = judged(policy, question_tokens=12)
    requests = likelihoods(" sky", " the sun", " sky and grass")
    for (value, likeliest), (wanted, greedy) in zip(
        ours.loglikelihood(requests, disable_tqdm=True), plain.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert value == pytest.approx(wanted, rel=1e-4) and likeliest == greedy
    assert (ours.tally.prompts, ours.tally.short) == (1, 0)  # its continuations share what was read
    assert ours.tally.kept == ours.tally.rows
    wanted = plain.generate_until(generation(), disable_tqdm=True)
    assert ours.generate_until(generation(), disable_tqdm=True) == wanted


@pytest.mark.parametrize("policy", [SnapKV(), StreamingLLM(), KVzip()], ids=lambda policy: type(policy).__name__)
def test_rows_are_gone(judged, policy):
    full, ours = judged(None, question_tokens=20), judged(policy, 0.25, question_tokens=20)
    requests = likelihoods(" sky", " sun")
    values = ours.loglikelihood(requests, disable_tqdm=True)
    assert values != full.loglikelihood(requests, disable_tqdm=True)
    assert ours.tally.kept / ours.tally.rows == pytest.approx(0.25, abs=0.02)
    assert values == ours.loglikelihood(requests, disable_tqdm=True)
    assert len(ours.generate_until(generation(), disable_tqdm=True)) == 2
    assert ours.tally.prompts == 2  # the first text of the two was read before


def test_continuation_is_scored_from_the_rows_that_are_left(judged, loaded):
    """Beside the sink, only the last rows of a text are kept: what stood between may be anything."""
    _, tokenizer = loaded
    ours = judged(StreamingLLM(sink=1), 0.2, question_tokens=len(QUESTION))
    tokens = tokenizer(TEXT + QUESTION).input_ids
    cut = ours.cut(tokens)
    with ours.evicted(tokens[:cut]) as cache:
        kept = round(0.2 * cut)
        for layer in cache.ragged:
            expected = torch.tensor([0, *range(cut - kept + 1, cut)])
            for begin, count in zip(
                layer.rows.cu_seqlens.tolist(), layer.rows.lengths.flatten().tolist(), strict=False
            ):
                assert torch.equal(layer.rows.positions[begin : begin + count].long(), expected)


def test_what_is_compressed(judged, loaded):
    _, tokenizer = loaded
    tokens = tokenizer(TEXT + QUESTION).input_ids
    assert judged(None, question_tokens=9).cut(tokens) == len(tokens) - 9
    assert judged(None, question_tokens=900).cut(tokens) == 0
    assert judged(None, see_question=True).cut(tokens) == len(tokens) - 1
    assert judged(None, marker="\nQuestion:").cut(tokens) == len(TEXT)  # a token is a byte
    assert judged(None, marker="the").cut(tokens) == TEXT.rindex("the")
    assert judged(None, marker=":").cut(tokens) == len(tokens) - 1
    with pytest.raises(ValueError, match=r"lkv lm-eval: expected 'no' in every prompt, got one that ends with '.*Ans"):
        judged(None, marker="no").cut(tokens[-10:])


def test_short_prompts_are_counted_and_rolling_ones_refused(judged):
    ours = judged(SnapKV(), 0.25, question_tokens=500)
    ours.generate_until(generation(), disable_tqdm=True)
    assert (ours.tally.short, ours.tally.rows) == (1, 0)
    assert "too short to be compressed; of the others no rows kept" in str(ours.tally)
    with pytest.raises(ValueError, match="expected tasks with a prompt, got one of rolling loglikelihood"):
        ours.loglikelihood_rolling([])


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


def test_command_runs_tasks_and_says_what_was_compressed(tmp_path, folder, local_tasks, capsys):
    out = tmp_path / "results" / "report.json"
    command = ["lm-eval", "--model", str(folder), "--device", "cpu", "--include-path", local_tasks]
    command += ["--tasks", "local_generate", "local_choice", "--policies", "full", "snapkv", "--retentions", "0.25"]
    assert cli.main([*command, "--question-marker", "\nQuestion:", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    said = "not seen by the compression: all of a prompt is compressed but what begins with the last '\\nQuestion:'"
    assert printed.count(f"question {said}") == 2
    assert "snapkv at retention 0.25; question" in printed
    assert "local_generate" in printed and "exact_match" in printed
    report = json.loads(out.read_text())
    full, snapkv = report["reports"]
    assert full["kept"] == full["rows"] and snapkv["rows"] == full["rows"]
    assert snapkv["kept"] / snapkv["rows"] == pytest.approx(0.25, abs=0.02)
    assert not snapkv["question_seen"] and 0 <= snapkv["results"]["local_choice"]["acc,none"] <= 1
    assert cli.main([*command, "--policies", "streaming", "--see-question", "--limit", "1"]) == 0
    assert (
        "question seen by the compression: all of a prompt is compressed but its last token" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--retentions", "0"], "expected retentions in (0, 1], got 0.0"),
        (["--see-question", "--question-tokens", "4"], "got --see-question and --question-tokens"),
        (["--question-tokens", "0"], "expected question tokens >= 1, got 0"),
        (["--question-marker", ""], "expected a question marker with at least one letter"),
        (["--policies", "lkv"], "expected --checkpoint for the policy lkv, got none"),
        (["--policies", "best"], "expected policies of full, random, "),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert cli.main(["lm-eval", "--tasks", "any", *options]) == 2
    assert message in capsys.readouterr().err
