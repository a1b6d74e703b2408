"""Greedy answers from a cache: each row of a batch as if it were alone, up to its end token or the limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lkv.evaluate.decode import answer, pad_left
from lkv.hf import Cache
from lkv.policies.streaming_llm import StreamingLLM

PAD, BOS = 0, 2
CONTEXTS = [[BOS, *range(20, 20 + n)] for n in (9, 14, 5)]
QUESTIONS = [[200, 201, 202], [210], [220, 221, 222, 223, 224]]
NEVER = [-1]  # no token ends an answer


def read(model: PreTrainedModel, contexts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor]:
    """A cache of all rows, and which tokens of the padded texts are real."""
    tokens, present = pad_left(contexts, PAD)
    cache = Cache(model, StreamingLLM(), retention=1.0, chunks="last")
    places = (present.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model.get_decoder()(tokens, attention_mask=present, position_ids=places, past_key_values=cache, use_cache=True)
    return cache, present


def results(model: PreTrainedModel, limit: int, ends: Sequence[int] = NEVER, rows: Sequence[int] = (0, 1, 2)) -> list:
    cache, present = read(model, [CONTEXTS[b] for b in rows])
    return answer(model, cache, present, [QUESTIONS[b] for b in rows], limit, PAD, ends)


def generated(model: PreTrainedModel, row: int, limit: int) -> list[int]:
    """The same from `generate`, with a cache of transformers, and without end tokens."""
    prompt = torch.tensor([CONTEXTS[row] + QUESTIONS[row]])
    model.generation_config.eos_token_id = None
    out = model.generate(prompt, max_new_tokens=limit, do_sample=False, pad_token_id=PAD)
    return out[0, prompt.shape[1] :].tolist()


@contextmanager
def calls(model: PreTrainedModel) -> Iterator[list[dict[str, Tensor]]]:
    """What the decoder is given, call by call."""
    seen: list[dict[str, Tensor]] = []

    def record(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        names = ("attention_mask", "position_ids")
        seen.append({"tokens": args[0].clone()} | {name: kwargs[name].clone() for name in names})

    hook = model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    yield seen
    hook.remove()


def test_padding_is_on_the_left() -> None:
    tokens, present = pad_left([[7], [8, 9, 10], []], 5)
    assert tokens.tolist() == [[5, 5, 7], [8, 9, 10], [5, 5, 5]]
    assert present.tolist() == [[0, 0, 1], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_each_row_is_answered_as_generate_answers_it_alone(model: PreTrainedModel, limit: int) -> None:
    expected = [generated(model, b, limit) for b in range(3)]
    assert results(model, limit) == expected
    assert [results(model, limit, rows=[b])[0] for b in range(3)] == expected
    assert all(len(row) == limit for row in expected)


def test_positions_and_mask_go_on_behind_each_row(model: PreTrainedModel) -> None:
    cache, present = read(model, CONTEXTS)
    with calls(model) as seen:
        answer(model, cache, present, QUESTIONS, 3, PAD, NEVER)
    sizes = [len(c) for c in CONTEXTS]
    first = seen[0]
    assert first["tokens"].tolist() == pad_left(QUESTIONS, PAD)[0].tolist()
    for b, (size, question) in enumerate(zip(sizes, QUESTIONS, strict=True)):
        requests = len(question)
        assert first["position_ids"][b, -requests:].tolist() == list(range(size, size + requests))
        assert first["attention_mask"][b].tolist() == present[b].tolist() + [0] * (5 - requests) + [1] * requests
        for step in (1, 2):
            assert seen[step]["position_ids"][b].tolist() == [size + requests + step - 1]
            assert seen[step]["attention_mask"][b].tolist() == first["attention_mask"][b].tolist() + [1] * step
    assert len(seen) == 3


def test_an_end_token_ends_its_row_alone_and_is_left_off(model: PreTrainedModel) -> None:
    whole = [generated(model, b, 6) for b in range(3)]
    for b, row in enumerate(whole):
        for end in set(row):
            expected = [r[: r.index(end)] if end in r else r for r in whole]
            assert results(model, 6, [end]) == expected, (b, end)


def test_each_of_several_end_tokens_ends(model: PreTrainedModel) -> None:
    whole = [generated(model, b, 6) for b in range(3)]
    ends = [whole[0][3], whole[1][1], whole[2][2]]
    expected = [r[: min(r.index(end) for end in ends if end in r)] for r in whole]
    for order in (ends, ends[::-1]):
        assert results(model, 6, order) == expected


def test_token_0_is_a_word_where_it_is_written(model: PreTrainedModel) -> None:
    """An answer may hold any token, that of the padding included."""
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits equal: the first of them wins
    assert results(model, 3) == [[0, 0, 0]] * 3


def test_nothing_is_read_after_the_last_row_has_ended(model: PreTrainedModel) -> None:
    whole = [generated(model, b, 6) for b in range(2)]
    ends = [whole[0][1], whole[1][3]]
    lengths = [min(r.index(end) for end in ends if end in r) for r in whole]
    cache, present = read(model, CONTEXTS[:2])
    with calls(model) as seen:
        rows = answer(model, cache, present, QUESTIONS[:2], 6, PAD, ends)
    assert list(map(len, rows)) == lengths
    assert len(seen) == max(lengths) + 1
    short = lengths.index(min(lengths))
    assert lengths[0] != lengths[1]
    # A row that has ended is fed padding.
    assert all(call["tokens"][short].tolist() == [PAD] for call in seen[min(lengths) + 1 :])


def test_without_a_limit_nothing_is_written(model: PreTrainedModel) -> None:
    assert results(model, 0) == [[], [], []]
    assert results(model, 4, []) == results(model, 4, NEVER)  # a model without end tokens
