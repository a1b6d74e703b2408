"""What steps learn from: new texts that are read there and then, and records, over and over."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_texts import files, model, tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.learn import distill, targets
from lkv.learn.config import TrainConfig
from lkv.learn.lessons import Live, Recorded
from lkv.learn.recording import Recorder
from lkv.learn.records import Records
from lkv.learn.source import Source
from lkv.learn.validation import fidelity
from lkv.policies.kvzip import KVzip
from lkv.policies.lkv.checkpoint import Design, Shape
from lkv.second_pass import repeat_scores
from lkv.tasks import Words
from lkv.tasks.documents import documents

CONFIG = TrainConfig(
    design=Design(hidden=4, sink=2, window=3), length=420, facts=3, continuation=10, answer_tokens=4, questions=3,
    target="both", batch=2, tasks=("single",), retention=(0.1, 0.4), validation_retentions=(0.3, 0.999),
)  # fmt: skip
MODEL = model()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("texts")
    return Recorder(MODEL, tokenizer(), documents(files(folder)), CONFIG, folder / "records").run("train", 5)


def recorded(records: Records, **changes: object) -> Recorded:
    config = replace(CONFIG, **changes)
    torch.manual_seed(0)
    return Recorded(MODEL, config.design.build(Shape.of(MODEL)), records, config)


@pytest.mark.parametrize(("target", "weight"), [("attention", 1.0), ("kvzip", 0.25), ("both", 1.0), ("both", 0.25)])
def test_the_target_of_records_is_the_one_that_was_chosen(records: Records, target: str, weight: float) -> None:
    lessons = recorded(records, target=target, kvzip_weight=weight)
    reading, wanted = lessons.regression(3, [0, 1])
    for b, length in enumerate(reading.context.lengths.tolist()):
        text = reading.tokens[b, :length].tolist()
        (record,) = (x for x in map(records.__getitem__, range(5)) if x.tokens.tolist() == text)
        parts = {"attention": record.attention.float(), "kvzip": record.kvzip.float()}
        larger = torch.maximum(parts["attention"].exp(), weight * parts["kvzip"].exp()).log()
        expected = larger if target == "both" else parts[target]
        torch.testing.assert_close(torch.stack([x[b, :, :length] for x in wanted]), expected)
    assert not torch.equal(records[0].attention, records[0].kvzip)


def test_every_record_comes_before_any_comes_again(records: Records) -> None:
    lessons, seen = recorded(records), []
    for step in range(5):
        reading = lessons.inputs([0, 1]) if step == 0 else lessons.regression(step, [0, 1])[0]
        seen += [tuple(reading.tokens[b, :n].tolist()) for b, n in enumerate(reading.context.lengths)]
    assert Counter(seen[:5]).keys() == Counter(seen[5:]).keys() and len(set(seen)) == 5
    assert seen[:5] != seen[5:]
    part = recorded(records).regression(2, [1])[0]  # whoever reads it
    assert part.tokens[0, : part.context.lengths[0]].tolist() == list(seen[5])


def test_questions_are_drawn_and_the_continuation_is_always_there(records: Records) -> None:
    lessons, asked = recorded(records), set()
    known = {tuple(q): r for i in range(5) for q, r in zip(records[i].questions, records[i].replies, strict=True)}
    last = {tuple(records[i].replies[-1]) for i in range(5)}
    for step in range(8):
        _, questions, replies = lessons.distillation(step, [0, 1])
        assert (questions, replies) == lessons.distillation(step, [0, 1])[1:]
        assert len(questions) == len(replies) == 6
        assert [tuple(r) in last for r in replies] == [True, False, False] * 2
        for b in range(2):
            rows = questions[3 * b + 1 : 3 * b + 3]
            assert len({tuple(q) for q in rows}) == 2  # none twice while there are others
            asked |= {tuple(q) for q in rows}
        pairs = [(q, r) for q, r in zip(questions, replies, strict=True) if tuple(r) not in last]
        assert len(pairs) == 4 and all(known[tuple(q)] == r for q, r in pairs)
    assert len(asked) == 15
    _, questions, replies = recorded(records, questions=6).distillation(0, [0])
    assert len(questions) == 6 and tuple(replies[0]) in last and len({tuple(q) for q in questions[1:]}) == 3
    assert all(tuple(r) not in last for r in recorded(records, questions=1).distillation(0, [0, 1])[2])


def test_shares_of_records_are_of_all_of_them(records: Records) -> None:
    shares = recorded(records, target="attention").shares([0], 0.25)
    each = [
        targets.joint_shares(torch.tensor([len(x.tokens)]), list(x.attention.float()[:, None]), 0.25, 2, 3)[0]
        for x in map(records.__getitem__, range(5))
    ]
    torch.testing.assert_close(shares, torch.stack(each).mean(0))
    assert shares.shape == (3, 2) and shares.std() > 0.01
    competing = (0.25 * 430 - 5) / (430 - 5)
    assert shares.mean().item() == pytest.approx(competing, abs=0.01)


def test_records_without_a_second_pass_have_no_such_target(records: Records) -> None:
    lessons = recorded(records)
    lessons.records = [replace(records[0], kvzip=None)] * 5
    with pytest.raises(ValueError, match="expected records with a second pass for the target 'both'"):
        lessons.regression(0, [0])


@pytest.mark.parametrize("target", ["attention", "kvzip", "both"])
def test_new_texts_are_read_and_asked_there_and_then(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: str
) -> None:
    config = replace(CONFIG, target=target, kvzip_weight=0.25, length=60, questions=2)
    source, lkv = Source(config, tokenizer, Words()), config.design.build(Shape.of(model))
    live = Live(model, lkv, source, [3])
    reading, wanted = live.regression(1, [0, 1])
    examples = source.examples(-2, [0, 1])
    again = distill.read(model, lkv, examples.contexts)
    assert torch.equal(reading.tokens, again.tokens)
    replies = distill.answers(model, again.context.repeat(2), examples.questions, 4, [3])
    paid = targets.attention(model, again.context, examples.questions, replies)
    repeated = repeat_scores(model, again.context, again.tokens, KVzip())
    expected = {"attention": paid, "kvzip": repeated, "both": targets.larger(paid, [0.25 * x for x in repeated])}[
        target
    ]
    for a, b in zip(wanted, expected, strict=True):
        torch.testing.assert_close(a, b.clamp(min=1e-4).log())
    shares = live.shares([0, 1], 0.3)
    first = targets.joint_shares(reading.context.lengths, live.regression(0, [0, 1])[1], 0.3, 2, 3)
    torch.testing.assert_close(shares, first.mean(0))


@torch.no_grad()
def test_validation_is_what_the_student_loses(records: Records) -> None:
    """By hand for one record; with all rows there is nothing to lose."""
    lessons = recorded(records)
    lessons.records = Records(records.folder, "train", 1)
    found = fidelity(lessons)(lessons.lkv)
    assert set(found) == {"0.3 facts", "0.3 continuation", "0.999 facts", "0.999 continuation"}
    assert found["0.3 facts"] < -1e-4 and found["0.3 continuation"] < -1e-4
    assert abs(found["0.999 facts"]) < 0.05 * abs(found["0.3 facts"])
    record = records[0]
    reading = lessons.reading([record])
    masks = distill.log_masks(lessons.lkv, reading, torch.tensor([0.3]), 0.05, hard=True)
    total, count = 0.0, 0
    for question, reply in zip(record.questions[:3], record.replies[:3], strict=True):
        loss, tokens, _ = distill.divergence(MODEL, reading.context, masks, [question], [reply])
        total, count = total - float(loss), count + tokens
    assert found["0.3 facts"] == pytest.approx(total / count, rel=1e-3)
