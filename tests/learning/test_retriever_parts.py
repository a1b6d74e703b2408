"""What the retriever is made of and trained on: its shape, its tokenizer, its attention, its texts and their labels."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lkv import retriever, tasks
from lkv.retriever import data
from lkv.retriever.data import IGNORE, MIX, Stage, repeated, size, texts
from lkv.retriever.model import SHORT, attention, build
from lkv.tasks import Words


def test_the_model_that_is_shipped_is_built_here(words: Words) -> None:
    shipped, _ = retriever.load()
    made = build(words)
    # The weights tell these sizes, the configuration the rest.
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}
    for name in ("max_position_embeddings", "tie_word_embeddings", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "pad_token_id", "bos_token_id", "eos_token_id"):  # fmt: skip
        assert getattr(made.config, name) == getattr(shipped.config, name), name
    assert shipped.dtype == torch.float32 and not shipped.training
    first, again, other = (build(words, *seed).lm_head.weight for seed in ((), (0,), (1,)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_tokenizer_that_is_shipped_is_built_here(words: Words, tokenizer: PreTrainedTokenizerBase) -> None:
    _, shipped = retriever.load()
    text = "<s> set Bala to 41 87 . nowhere </s>"
    assert tokenizer(text).input_ids == shipped(text).input_ids
    assert tokenizer(text).input_ids == words.encode(text.replace("nowhere", "<unk>"))
    for each in (tokenizer, shipped):
        assert each.decode(words.encode("find Bala : 41 .")) == "find Bala : 41 ."
        assert [each.pad_token, each.unk_token, each.bos_token, each.eos_token] == ["<pad>", "<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("n", [1, 7, SHORT, SHORT + 1])
def test_attention_is_causal_attention(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads in (6, 2, 2))
    out, weights = attention(None, q, k, v, None, scaling=0.3)
    k, v = (t.double().repeat_interleave(3, 1) for t in (k, v))
    logits = (q.double() @ k.transpose(2, 3) * 0.3).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out.double(), (logits.softmax(-1) @ v).transpose(1, 2), rtol=0, atol=1e-5)
    assert weights is None and out.shape == (2, n, 6, 8)


def test_repeated_sequences() -> None:
    rng = torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(60):
        tokens, labels = repeated(rng, 3, 12, longest=10)
        length = tokens.shape[1] // 3
        lengths.add(length)
        assert tokens.shape == labels.shape == (3, 3 * length)
        assert torch.equal(tokens, tokens[:, :length].repeat(1, 3))
        assert tokens.min() >= 4 and tokens.max() < 12  # no special tokens
        # The first of the second time cannot be known: which token ends a sequence is seen only there.
        assert (labels[:, : length + 1] == IGNORE).all() and torch.equal(
            labels[:, length + 1 :], tokens[:, length + 1 :]
        )
    assert lengths == {8, 9, 10}


@pytest.mark.parametrize("task", MIX)
def test_texts_ask_for_what_they_hold(task: str, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a text of the split "train" come questions about it; labels are the tokens of the answers alone."""
    requests = []
    monkeypatch.setattr(data, "MIX", {task: 1.0})
    make = tasks.scene
    monkeypatch.setattr(tasks, "scene", lambda *args, **more: requests.append((args, more)) or make(*args, **more))
    tokens, labels = texts(random.Random(1), words, Stage(length=160, facts=4, batch=3, steps=1), questions=2)
    assert tokens.shape == labels.shape and len(tokens) == len(requests) == 3
    for row, marks, (args, more) in zip(tokens.tolist(), labels.tolist(), requests, strict=True):
        assert args[0] == task and args[2] == 160 and more["split"] == "train" and more["language"] is words
        scene = make(*args, **more)
        text = words.encode("<s> " + scene.context)
        assert row[: len(text)] == text and marks[: len(text)] == [IGNORE] * len(text)
        answers = {(*words.encode(q.text), *words.encode(q.answer)): words.encode(q.answer) for q in scene.questions}
        at, count = len(text), 0
        while at < len(row) and row[at] != 0:
            question = next(x for x in answers if tuple(row[at : at + len(x)]) == x)
            answer = answers[question]
            silent = len(question) - len(answer)
            assert marks[at : at + len(question)] == [IGNORE] * silent + answer
            at, count = at + len(question), count + 1
        assert count == min(2, len(scene.questions))
        assert row[at:] == [0] * (len(row) - at) and marks[at:] == [IGNORE] * (len(row) - at)
    assert any(row[-1] != 0 for row in tokens.tolist())


def test_tasks_are_mixed_by_their_weights(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    make = tasks.scene
    monkeypatch.setattr(tasks, "scene", lambda *args, **more: drawn.append(args[0]) or make(*args, **more))
    texts(random.Random(0), words, Stage(length=96, facts=1, batch=300, steps=1), questions=1)
    whole = sum(MIX.values())
    for task, weight in MIX.items():
        share = weight / whole
        assert abs(drawn.count(task) / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5, task


# By hand: what the stages of 1, 3, 4, 8, 9 and 20 facts ask of a task.
SIZES = {
    "multi_key": [{"keys": 2}, {"keys": 3}, {"keys": 4}, {"keys": 8}, {"keys": 8}, {"keys": 8}],
    "multi_query": [{"keys": 2}, {"keys": 3}, {"keys": 4}, {"keys": 8}, {"keys": 8}, {"keys": 8}],
    "multi_value": [{"keys": 1, "values": 2}] * 2 + [{"keys": 2, "values": 2}] * 2 + [{"keys": 3, "values": 3}] * 2,
    "key_value": [{"names": 2, "attributes": 2}] * 4 + [{"names": 3, "attributes": 3}] * 2,
    "variable_tracking": [{"chains": 2, "hops": 1}] * 4 + [{"chains": 3, "hops": 2}] * 2,
    "single": [{}] * 6,
    "common_words": [{}] * 6,
    "frequent_words": [{}] * 6,
}


@pytest.mark.parametrize("task", MIX)
def test_sizes_grow_with_the_stages(task: str) -> None:
    assert [size(task, Stage(512, facts, 1, 1)) for facts in (1, 3, 4, 8, 9, 20)] == SIZES[task]
