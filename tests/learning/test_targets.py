"""What LKV-T is regressed on: attention that the model itself pays, question by question."""

from __future__ import annotations

import pytest
import torch
from own_settings import MODELS, build, tokens
from test_second_pass import context_of
from torch import Tensor

from lkv.learn import targets

QUESTIONS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
REPLIES = [[20, 2], [21, 22, 23], [2], [24]]


def plain(name: str, text: Tensor, asked: list[int]) -> list[Tensor]:
    """`[H, n]` per layer, of the weights of a pass over everything."""
    model = build(name)
    whole = torch.cat([text, torch.tensor(asked)])[None]
    weights = model(whole, output_attentions=True, use_cache=False).attentions
    heads = model.config.num_key_value_heads
    return [w[0, :, len(text) :, : len(text)].unflatten(0, (heads, -1)).amax((1, 2)) for w in weights]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "sinks"])  # whose part the weights lack
def test_the_target_is_the_most_that_questions_and_answers_pay(name: str) -> None:
    """Two questions for each of two texts of different length; the last token of an answer asks for nothing."""
    texts = [tokens(1, n, seed=n)[0] for n in (31, 24)]
    with torch.no_grad():
        got = targets.attention(build(name), context_of(build(name), texts), QUESTIONS, REPLIES)
        for b, text in enumerate(texts):
            parts = [plain(name, text, [*QUESTIONS[i], *REPLIES[i]][:-1]) for i in (2 * b, 2 * b + 1)]
            for layer, found in enumerate(got):
                wanted = torch.maximum(parts[0][layer], parts[1][layer])
                torch.testing.assert_close(found[b, :, : len(text)], wanted, rtol=1e-4, atol=1e-5)
                assert (found[b, :, len(text) :] == 0).all()


def test_the_larger_of_two() -> None:
    a, b = torch.tensor([[0.1, 0.5]]), torch.tensor([[0.2, 0.3]])
    (got,) = targets.larger([a], [b])
    torch.testing.assert_close(got, torch.tensor([[0.2, 0.5]]))


def test_logarithms_have_a_floor() -> None:
    paid = torch.tensor([1.0, 0.5, 2e-4, 1e-5, 0.0])
    wanted = torch.tensor([1.0, 0.5, 2e-4, 1e-4, 1e-4]).log()
    torch.testing.assert_close(targets.logarithm(paid), wanted)


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (2, 3)])
def test_shares_are_what_heads_win(sink: int, window: int) -> None:
    """Every text by itself, rows that are protected apart; counted by hand."""
    torch.manual_seed(0)
    lengths, target = torch.tensor([40, 25]), [torch.randn(2, 2, 40) + 2 * layer for layer in range(3)]
    for x in target:
        x[1, :, 25:] = 100.0  # padding
    shares = targets.joint_shares(lengths, target, 0.4, sink, window)
    assert shares.shape == (2, 3, 2)
    for b, n in enumerate(lengths.tolist()):
        middle = torch.stack([x[b, :, sink : n - window] for x in target])
        competing = n - sink - window
        count = round(0.4 * n) * 6 - 6 * (sink + window)
        least = middle.flatten().sort(descending=True).values[count - 1]
        torch.testing.assert_close(shares[b], (middle >= least).sum(-1) / competing)
        assert shares[b].mean().item() == pytest.approx(count / 6 / competing)
    assert shares[:, 2].min() > shares[:, 0].max()
