"""Eviction in the pages of an engine's pool: the rows of a dense eviction, wherever the rows of a page lie."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lkv.vllm.pages import Pages, on_device, rows
from lkv.vllm.settings import dropped
from lkv.vllm.step import Ended

HEADS, PAGE, DIM, BLOCKS = 3, 16, 8, 64
ORDERS = {"NHD": (0, 2, 1, 3), "HND": (0, 1, 2, 3), "layers apart": (0, 1, 2, 3)}
PROMPTS = ((33,), (16, 64, 65), (100, 50))
SINK, WINDOW = 2, 3


def pool(order: str, heads: int) -> Tensor:
    """`[P, H, page, 2 * D]`, in memory as the order says; "layers apart": with other layers between the blocks."""
    torch.manual_seed(0)
    shape = BLOCKS, heads, PAGE, 2 * DIM
    if order == "layers apart":
        return torch.randn(BLOCKS, 2, *shape[1:])[:, 1]
    axes = ORDERS[order]
    return torch.randn([shape[i] for i in axes]).permute(axes)  # each order is its own inverse


def ended(prompts: Sequence[int], shares: Sequence[float]) -> list[Ended]:
    """Prompts with tables of their own; without the null block."""
    free = iter((torch.randperm(BLOCKS - 1) + 1).tolist())
    found = []
    for prompt in prompts:
        tables = [[next(free) for _ in range(-(-prompt // PAGE))] for _ in shares]
        drops = [dropped(prompt, 0.4 * share, PAGE) for share in shares]
        found.append(Ended(prompt, 0, 0, drops, torch.tensor(tables)))
    return found


def scores(keys: Tensor, values: Tensor) -> Tensor:
    assert keys.shape == values.shape and keys.shape[0] == HEADS
    return (keys.float() * 2 - values.float()).sum(-1)[None]


def dense(cache: Tensor, one: Ended, head: int) -> Tensor:
    """`[prompt, 2 * D]` of a head: token by token, without the code that is tested."""
    own = len(one.tables) > 1
    table = one.tables[head if own else 0].tolist()
    return torch.stack([cache[table[t // PAGE], 0 if own else head, t % PAGE] for t in range(one.prompt)])


def kept(ranking: Tensor, count: int) -> list[int]:
    """The first `SINK` rows, the last `WINDOW` and the best of the others, in their order."""
    ends = [*range(SINK), *range(len(ranking) - WINDOW, len(ranking))]
    inner = sorted(range(SINK, len(ranking) - WINDOW), key=lambda i: -ranking[i].item())
    return sorted(ends + inner[: count - len(ends)])


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 1.0, 3.0)], ids=["equal", "heads"])
@pytest.mark.parametrize("prompts", PROMPTS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_kept_rows_lie_behind_those_that_go(order: str, prompts: tuple[int, ...], shares: tuple[float, ...]) -> None:
    cache = pool(order, HEADS // len(shares))
    everyone, before = ended(prompts, shares), cache.clone()
    written = torch.zeros(cache.shape[:3], dtype=torch.bool)
    Pages.of(everyone, HEADS).evict(cache, scores, SINK, WINDOW)
    for one in everyone:
        for head in range(HEADS):
            whole, drop = dense(before, one, head), one.drops[head if len(shares) > 1 else 0]
            ranking = scores(*(x.expand(HEADS, -1, -1) for x in whole.split(DIM, -1)))[0, 0]
            assert torch.equal(dense(cache, one, head)[drop:], whole[kept(ranking, one.prompt - drop)])
            table = one.tables[head if len(shares) > 1 else 0].tolist()
            for token in range(drop, one.prompt):
                written[table[token // PAGE], 0 if len(shares) > 1 else head, token % PAGE] = True
    assert any(any(one.drops) for one in everyone)
    assert torch.equal(cache[~written], before[~written])  # blocks that go, which others may share, and those of others


def test_numbers_of_a_batch() -> None:
    everyone = ended((33, 64), (0.5, 1.0, 3.0))
    pages = Pages.of(everyone, HEADS)
    assert pages.prompts == [33, 64] and pages.lengths.tolist() == [33, 64] and pages.most == 64
    assert pages.budgets.tolist() == [[p - d for d in one.drops] for p, one in zip((33, 64), everyone, strict=True)]
    assert pages.tables.shape == (2, HEADS, 4) and torch.equal(pages.tables[1], everyone[1].tables)
    shared = Pages.of(ended((33, 64), (1.0,)), HEADS)
    assert shared.tables.shape == (2, 4) and shared.budgets.shape == (2, HEADS)


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 1.0, 3.0)], ids=["equal", "heads"])
def test_nothing_is_read_on_the_host(shares: tuple[float, ...]) -> None:
    """On a device without numbers, whatever would wait for one raises."""
    everyone = ended((33, 64), shares)
    for one in everyone:
        one.tables = one.tables.to("meta")
    pages = Pages.of(everyone, HEADS)
    assert {t.device.type for t in (pages.tables, pages.lengths, pages.budgets)} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        pages.lengths.tolist()
    pages.evict(pool("NHD", HEADS // len(shares)).to("meta"), scores, SINK, WINDOW)


def test_rows_of_a_sequence() -> None:
    cache = pool("NHD", HEADS)
    [one] = ended((37,), (1.0,))
    got = rows(cache, one.tables[0], 37)
    assert torch.equal(got, torch.stack([dense(cache, one, head) for head in range(HEADS)]))
    assert on_device(one.tables, torch.device("cpu")) is one.tables
