"""Records of passages: what the model read and answered, made once, in pieces if need be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_texts import files, model, tokenizer

from lkv import retriever
from lkv.learn import distill, recording, targets
from lkv.learn.config import TrainConfig
from lkv.learn.dialogue import exchange
from lkv.learn.lessons import Recorded
from lkv.learn.recording import Recorder, tokenizer_fingerprint
from lkv.learn.records import Record
from lkv.passes import Context
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.second_pass import in_words, repeat_scores
from lkv.tasks.documents import Document, documents
from lkv.tasks.passages import synthetic

CONFIG = TrainConfig(
    design=Design(hidden=4), length=500, facts=2, continuation=12, answer_tokens=5, questions=2, target="attention"
)
MODEL = model()
Make = Callable[..., Recorder]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    return documents(files(tmp_path_factory.mktemp("texts")))


@pytest.fixture
def make(found: list[Document], tmp_path: Path) -> Make:
    def recorder(*, by: object = MODEL, chat: bool = True, config: TrainConfig = CONFIG, **more: object) -> Recorder:
        folder = tmp_path / str(more.pop("into", "records"))
        return Recorder(by, tokenizer(chat), more.pop("found", found), config, folder, **more)

    return recorder


@torch.no_grad()
@pytest.mark.parametrize("replies", ["right", "own"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_record_is_what_the_model_made_of_the_passage(make: Make, chat: bool, replies: str) -> None:
    run = make(chat=chat, config=replace(CONFIG, replies=replies))
    text = run.passage("train", 1)
    record, talk = run.record(text), exchange(run.tokenizer, text, 13)
    assert record.tokens.tolist() == talk.context and (record.domain, record.document) == (text.domain, text.document)
    layers = MODEL(torch.tensor([talk.context]), use_cache=True).past_key_values.layers
    keys, values = tuple(x.keys for x in layers), tuple(x.values for x in layers)
    for mine, wanted in ((record.keys, keys), (record.values, values)):
        torch.testing.assert_close(mine.float(), torch.cat(wanted), rtol=0.01, atol=1e-5)
    assert record.continues and record.questions == [*talk.questions, talk.continuation[:1]]
    assert record.replies[-1] == talk.continuation[1:] and len(record.replies[-1]) == 12
    context = Context(keys, values, torch.tensor([len(talk.context)]))
    own = distill.answers(MODEL, context.repeat(2), talk.questions, 5, [2])
    assert record.replies[:2] == (talk.answers if replies == "right" else own) and own != talk.answers
    paid = targets.attention(MODEL, context, record.questions, record.replies)
    torch.testing.assert_close(record.attention.float(), torch.cat(paid).clamp(min=1e-4).log(), rtol=1e-2, atol=1e-2)
    assert record.kvzip is None and record.hidden is None
    stored = {name: getattr(record, name).dtype for name in ("tokens", "keys", "values", "attention")}
    assert stored == dict(tokens=torch.int32, keys=torch.bfloat16, values=torch.bfloat16, attention=torch.float16)


@torch.no_grad()
def test_rotations_are_stored_as_float32(make: Make) -> None:
    """Of a model in half precision too, whose own are rounded to it."""
    run = make(by=model().bfloat16())
    record = run.record(run.passage("train", 1))
    assert record.cos is not None and record.sin is not None
    assert record.cos.dtype == record.sin.dtype == torch.float32


@pytest.mark.parametrize("letters", [12, 150])
def test_a_continuation_is_as_long_as_wanted(make: Make, letters: int) -> None:
    """Whatever is usual: texts end early enough for it."""
    run = make(config=replace(CONFIG, continuation=letters))
    for i in range(6):
        text = run.passage("train", i)
        assert run.count(text.continuation) > letters and run.count(text.text) <= CONFIG.length
        assert len(exchange(run.tokenizer, text, letters + 1).continuation) == letters + 1


@torch.no_grad()
@pytest.mark.parametrize("target", ["kvzip", "both"])
def test_a_second_pass_repeats_the_passage_alone(make: Make, target: str) -> None:
    run = make(config=replace(CONFIG, target=target))
    text = run.passage("train", 0)
    record, talk = run.record(text), exchange(run.tokenizer, text, 13)
    tokens = torch.tensor([talk.context])
    layers = MODEL(tokens, use_cache=True).past_key_values.layers
    context = Context(tuple(x.keys for x in layers), tuple(x.values for x in layers), torch.tensor([tokens.shape[1]]))
    policy = in_words(KVzip(), run.tokenizer)
    wanted = torch.cat(repeat_scores(MODEL, context, tokens, policy, begin=talk.protected)).clamp(min=1e-4).log()
    torch.testing.assert_close(record.kvzip.float(), wanted, rtol=1e-2, atol=1e-2)
    least = record.kvzip.min()
    assert talk.protected == 6 and (record.kvzip[..., :6] == least).all() and (record.kvzip[..., 6:] > least).any()


@torch.no_grad()
@pytest.mark.parametrize("input", ["kv", "hidden"])
@pytest.mark.parametrize("kind", ["plain", "yarn"])
def test_what_is_read_of_records_is_what_reading_gives(make: Make, input: str, kind: str) -> None:
    """To the rounding of bfloat16, texts of several lengths together; rotations undone, scaled ones as well."""
    yarn = dict(rope_type="yarn", factor=8.0, rope_theta=10000.0, original_max_position_embeddings=512)
    by = MODEL if kind == "plain" else model(rope_scaling=yarn)
    config = replace(CONFIG, design=replace(CONFIG.design, input=input))
    records = make(by=by, config=config).run("train", 3)
    lkv = config.design.build(Shape.of(by))
    some = [records[i] for i in range(3)]
    reading = Recorded(by, lkv, records, config).reading(some)
    wanted = distill.read(by, lkv, [x.tokens.tolist() for x in some])
    assert torch.equal(reading.tokens, wanted.tokens) and torch.equal(reading.context.lengths, wanted.context.lengths)
    assert len(set(wanted.context.lengths.tolist())) > 1
    for name in ("keys", "values"):
        for a, b in zip(getattr(reading.context, name), getattr(wanted.context, name), strict=True):
            torch.testing.assert_close(a, b, rtol=0.01, atol=1e-4)
    for a, b in zip(reading.features, wanted.features, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_an_interrupted_run_makes_what_is_missing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the record that was being made is lost; the others are not made again, and are the same."""
    made: list[str] = []
    record = Recorder.record

    def spy(self: Recorder, text: object) -> Record:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(text.text)
        return record(self, text)

    monkeypatch.setattr(Recorder, "record", spy)
    with pytest.raises(KeyboardInterrupt):
        make().run("train", 4)
    monkeypatch.undo()
    records = make().run("train", 2)
    assert records.missing() == []
    times = [records.path(i).stat().st_mtime_ns for i in range(2)]
    whole = make().run("train", 4)
    assert [whole.path(i).stat().st_mtime_ns for i in range(2)] == times and whole.missing() == []
    assert torch.equal(whole[3].keys, make().record(make().passage("train", 3)).keys)


def test_processes_share_the_records(make: Make) -> None:
    assert make(process=1, processes=3).run("train", 5).missing() == [0, 2, 3]
    assert make(process=0, processes=3).run("train", 5).missing() == [2]


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_shows_how_far_it_is(make: Make, process: int, capfd: pytest.CaptureFixture[str]) -> None:
    make(process=process, processes=2).run("train", 2)
    assert ("lkv train: train texts" in capfd.readouterr().err) == (process == 0)


def test_a_disk_that_will_be_full_is_found_out_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="expected 1 MB of free space for records in .*records, got less"):
        make().run("train", 3)
    assert make().run("train", 1).missing() == []  # what was made is there, and enough


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(by=model(1)), "model"),
        (dict(chat=False), "tokenizer"),
        (dict(config=replace(CONFIG, length=501)), "length 501, which was 500"),
        (dict(config=replace(CONFIG, longest=800)), "longest 800, which was 0"),
        (dict(config=replace(CONFIG, facts=3)), "facts 3, which was 2"),
        (dict(config=replace(CONFIG, continuation=0)), "continuation 0"),
        (dict(config=replace(CONFIG, replies="own")), 'replies "own", which was "right"'),
        (dict(config=replace(CONFIG, answer_tokens=6)), "answer_tokens 6"),
        (dict(config=replace(CONFIG, seed=1)), "seed 1"),
        (dict(config=replace(CONFIG, target="both")), "kvzip true, which was false"),
        (dict(config=replace(CONFIG, design=Design(input="hidden"))), 'input "hidden", which was "kv"'),
        (dict(found=[]), "documents"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_records_of_something_else_are_refused(make: Make, change: dict, named: str) -> None:
    make()
    with pytest.raises(ValueError, match=f"^lkv train: expected the records in .* got others: {named}"):
        make(**change)


def test_passages_for_training_have_lengths_of_their_own(make: Make) -> None:
    config = replace(CONFIG, longest=1200)
    run = make(config=config)
    for i in range(4):
        assert config.length_of("train", i) - 30 < len(run.passage("train", i).text) <= config.length_of("train", i)
        assert 470 < len(run.passage("validation", i).text) <= 500


@pytest.mark.parametrize("split", ["train", "validation"])
def test_passages_are_of_their_split(make: Make, found: list[Document], split: str) -> None:
    """Of files of that split, or made for it."""
    run = make(config=replace(CONFIG, length=900, synthetic=0.5, tasks=("key_value",)))
    splits = {(x.domain, x.name): x.split for x in found}
    for i in range(6):
        made = run.passage(split, i)
        if i % 2:
            assert made == synthetic("key_value", i // 2, 900, run.count, split=split)
        else:
            assert splits[made.domain, made.document] == split


def test_other_wordings_make_other_records(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    monkeypatch.setattr(recording, "TRAINED", recording.TRAINED[1:])
    with pytest.raises(ValueError, match="got others: wordings "):
        make()


def test_what_does_not_change_a_record_may_change(make: Make) -> None:
    make(config=replace(CONFIG, target="both")).run("train", 1)
    again = make(config=replace(CONFIG, texts=7, steps=3, batch=5, design=Design(hidden=9, sink=1)))
    assert again.run("train", 2)[1].kvzip is not None  # as the others have it


def test_the_tokenizer_is_known_by_what_it_does() -> None:
    marks = {tokenizer_fingerprint(tokenizer(chat)) for chat in (True, False)}
    lower = tokenizer()
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert len(marks | {tokenizer_fingerprint(lower)}) == 3
    again = tokenizer()
    again(["a", "longer"], padding=True)
    assert tokenizer_fingerprint(again) in marks


def test_a_model_that_does_not_know_the_words_is_refused(found: list[Document], tmp_path: Path) -> None:
    """As the retriever would be, which is what is trained where no other model is named."""
    own, words = retriever.load()
    with pytest.raises(
        ValueError, match=r"texts that the tokenizer of the model knows, got .*, .* not know \d\d+%: is"
    ):
        Recorder(own, words, found, replace(CONFIG, length=90), tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_without_a_continuation_there_are_questions_alone(make: Make) -> None:
    run = make(config=replace(CONFIG, continuation=0))
    record = run.record(run.passage("train", 0))
    assert not record.continues and len(record.questions) == len(record.replies) == 2


@pytest.mark.parametrize("share", [0.25, 1 / 3, 0.5])
def test_synthetic_texts_take_their_share_and_leave_files_as_they_are(make: Make, share: float) -> None:
    """Tasks take turns, and so do the domains of what is left."""
    tasks, count = ("single", "key_value"), 24
    config = replace(CONFIG, length=900)
    files_alone = [make(config=config).passage("train", i) for i in range(count)]
    run = make(config=replace(config, synthetic=share, tasks=tasks), into="mixed")
    passages = [run.passage("train", i) for i in range(count)]
    made = [x for x in passages if x.domain == "synthetic"]
    assert len(made) == int(count * share)
    assert [x.facts[0].kind for x in made] == [tasks[i % 2] for i in range(len(made))]
    assert len({x.text for x in made}) == len(made)
    assert [x for x in passages if x.domain != "synthetic"] == files_alone[: count - len(made)]


@torch.no_grad()
def test_a_synthetic_text_is_recorded_without_a_continuation(make: Make) -> None:
    config = replace(CONFIG, length=900, synthetic=0.5, tasks=("key_value",))
    run = make(config=config)
    records = run.run("train", 4)
    kinds = [(x.domain == "synthetic", x.continues, len(x.questions)) for x in (records[i] for i in range(4))]
    assert kinds == [(False, True, 3), (True, False, 9)] * 2
    lessons = Recorded(MODEL, config.design.build(Shape.of(MODEL)), records, replace(config, batch=4))
    _, questions, replies = lessons.distillation(0, range(4))
    assert len(questions) == len(replies) == 4 * config.questions
    with pytest.raises(ValueError, match="synthetic"):
        make(config=replace(config, synthetic=0.25))
    with pytest.raises(ValueError, match="tasks"):
        make(config=replace(config, tasks=("single",)))
    with pytest.raises(ValueError, match="synthetic"):
        make(config=replace(config, synthetic=0.0))


@pytest.mark.parametrize("synthetic", [0.0, 0.5])
@pytest.mark.parametrize("longest, enough", [(2500, True), (5000, False), (9000, False)])
def test_texts_that_are_too_short_are_found_out_at_once(
    make: Make, longest: int, enough: bool, synthetic: float
) -> None:
    """Whichever passages they are too short for; the folder is as it was."""
    reads_more = model(max_position_embeddings=16384)
    config = replace(CONFIG, longest=longest, synthetic=synthetic, tasks=("single",), texts=12)
    if enough:
        recorder = make(by=reads_more, config=config)
        assert all(recorder.passage("train", i) for i in range(12))
    else:
        with pytest.raises(ValueError, match="expected a file of more than"):
            make(by=reads_more, config=config)
        make(by=reads_more)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_texts_of_both_splits_have_to_be_long_enough(make: Make, found: list[Document], split: str) -> None:
    short = [replace(x, text=x.text[:100]) if x.split == split else x for x in found]
    with pytest.raises(ValueError, match=f"expected a file of more than .* in the split '{split}'"):
        make(found=short)
    make()
