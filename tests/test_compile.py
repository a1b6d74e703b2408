"""torch.compile with fullgraph=True: one graph for all batches, heads, lengths and values, save for lists of another
length, which torch.compile tells apart by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import bits, generator
from test_torch import compiled
from torch import Tensor

import lkv_ext

# B, H and L, none of them 1 or equal to another size of the call: torch.compile makes graphs of their own for those.
SHAPES = ((3, 4, 24), (4, 5, 25), (6, 3, 31))
D = 7


def tensors(batch: int, heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    g = generator(tokens)
    return torch.randn(batch, heads, tokens, D, generator=g), torch.randn(batch, heads, tokens, generator=g)


def integers(kind: str, batch: int, heads: int, first: int, *, of_sequences: bool = False) -> object:
    """One kind and shape, other values for every `first`; none below 2, as torch.compile sets 0 and 1 apart."""
    nested = first + torch.arange(batch * heads).view(batch, heads) % 3
    flat = nested[:, 0] if of_sequences else nested[0]
    return {
        "none": None,
        "int": first,
        "list": flat.tolist(),
        "nested": nested.tolist(),
        "tensor": flat,
        "both": nested,
    }[kind]


def run(function: Callable, arguments: Callable[[int, int, int, int], tuple], lists: bool) -> None:
    fast, counter = compiled(function, dynamic=True)
    shapes = SHAPES[:2] if lists else SHAPES
    for shape in shapes:
        for seed in range(2):
            given = arguments(*shape, seed)
            twin = [t.clone() if isinstance(t, Tensor) else t for t in given]
            got, want = fast(*given), function(*twin)
            got, want = (out if isinstance(out, tuple) else (out,) for out in (got, want))
            for mine, theirs in zip(got, want, strict=True):
                assert torch.equal(bits(mine.contiguous()), bits(theirs.contiguous()))
            if seed == 0:
                frames = counter.frame_count
            assert counter.frame_count == frames, "recompiled for values"
    assert frames == (len(shapes) if lists else 1)


FORMS = [*((form, "none") for form in ("int", "list", "nested", "tensor", "both"))]
FORMS += [*(("int", form) for form in ("int", "list", "nested", "tensor")), ("list", "list"), ("both", "list")]


@pytest.mark.parametrize("budgets, lengths", FORMS)
def test_integers(budgets: str, lengths: str) -> None:
    """In whatever form they come, for evict and evict_."""
    on_device = budgets in ("tensor", "both")
    span = dict(capacity=90) if on_device else {}

    def shrink(k: Tensor, scores: Tensor, budgets: object, lengths: object) -> tuple[Tensor, ...]:
        out = lkv_ext.evict(k, None, scores, budgets, lengths=lengths, companions=[scores], **span)
        kept = lkv_ext.evict_(k, None, scores, budgets, lengths=lengths, max_budget=9)
        return out.lengths, bits(out.k).sum(0), kept.lengths, k.clone()

    def arguments(batch: int, heads: int, tokens: int, seed: int) -> tuple:
        sizes = integers(budgets, batch, heads, 2 + seed)
        many = integers(lengths, batch, heads, tokens - 4 - seed, of_sequences=True)
        return (*tensors(batch, heads, tokens), sizes, many)

    run(shrink, arguments, bool({budgets, lengths} & {"list", "nested"}))


def ragged(k: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    kv = lkv_ext.evict(k, None, scores, 7, reserve=2, companions=[scores])
    return kv.k, kv.companions[0], kv.cu_seqlens, kv.lengths


def moved(k: Tensor, scores: Tensor, budget: int) -> Tensor:
    return lkv_ext.gather([scores, k], lkv_ext.select(scores, budget))[1]


def evicted_again(
    k: Tensor, scores: Tensor, cu_seqlens: Tensor, lengths: Tensor, budgets: object
) -> tuple[Tensor, ...]:
    index = lkv_ext.select(scores, budgets, cu_seqlens=cu_seqlens, lengths=lengths)
    out = lkv_ext.evict(k, None, scores, budgets, cu_seqlens=cu_seqlens, lengths=lengths)
    return out.lengths, lkv_ext.gather([k], index, cu_seqlens=cu_seqlens)[0].sum(0)


def all_options(k: Tensor, scores: Tensor, n: int) -> Tensor:
    span = dict(sink=n, window=n + 1, reserve=n, align=n, max_budget=n + 9, capacity=n * 500)
    return lkv_ext.evict(k, k, scores, 3 * n, starts=n, **span).k


def layers(k: Tensor, scores: Tensor, budgets: object) -> tuple[Tensor, Tensor]:
    out = lkv_ext.evict_layers([k, k * 2], None, [scores, -scores], budgets, capacity=900)
    return out.lengths, out.layer(1).lengths


def over(k: Tensor, scores: Tensor, budget: int) -> Tensor:
    out = lkv_ext.evict(k, k, scores, budget)
    return lkv_ext.evict(k * 2, k, -scores, budget, out=out).k


def attended(k: Tensor, scores: Tensor, queries: Tensor, budget: int) -> Tensor:
    return lkv_ext.attend(queries, lkv_ext.evict(k, k, scores, budget))


def appended(k: Tensor, scores: Tensor, valid: object) -> tuple[Tensor, ...]:
    cache = lkv_ext.RaggedCache.empty(k.shape[0], k.shape[1], D, reserve=64)
    cache.append(k, k)
    cache.append(k, k, valid=valid)
    cache.evict(scores[0, 0, :1].expand(cache.k.shape[0]), 5)
    return cache.lengths, cache.positions


def relaxed(k: Tensor, scores: Tensor, rows: object, temperature: float) -> Tensor:
    return lkv_ext.soft_topk(scores, rows, temperature)


OPS: dict[str, tuple[Callable, Callable, bool]] = {
    "gather": (moved, lambda b, h, t, i: (*tensors(b, h, t), 3 + i), False),
    "ragged": (evicted_again, lambda b, h, t, i: (*ragged(*tensors(b, h, t)), 3 + i), False),
    "ragged, list": (evicted_again, lambda b, h, t, i: (*ragged(*tensors(b, h, t)), [3 + i] * h), True),
    "options": (all_options, lambda b, h, t, i: (*tensors(b, h, t), 2 + i), False),
    "evict_layers": (layers, lambda b, h, t, i: (*tensors(b, h, t), 3 + i), False),
    "evict_layers, list": (layers, lambda b, h, t, i: (*tensors(b, h, t), [[3 + i] * h, [4 + i] * h]), True),
    "evict_layers, tensor": (layers, lambda b, h, t, i: (*tensors(b, h, t), torch.full((2, h), 3 + i)), False),
    "out": (over, lambda b, h, t, i: (*tensors(b, h, t), 3 + i), False),
    "attend": (attended, lambda b, h, t, i: (*tensors(b, h, t), torch.ones(b, 2 * h, 9, D), 3 + i), False),
    "cache, list": (appended, lambda b, h, t, i: (*tensors(b, h, t), [4 + i] * b), True),
    "cache, tensor": (appended, lambda b, h, t, i: (*tensors(b, h, t), torch.full((b,), 4 + i)), False),
    "soft_topk": (relaxed, lambda b, h, t, i: (*tensors(b, h, t), 3.5 + i, 0.5 + i), False),
    "soft_topk of ints": (relaxed, lambda b, h, t, i: (*tensors(b, h, t), 3 + i, 2 + i), False),
    "soft_topk of tensors": (relaxed, lambda b, h, t, i: (*tensors(b, h, t), torch.full((h,), 3.5 + i), 0.5), False),
}


@pytest.mark.parametrize("op", OPS)
def test_ops(op: str) -> None:
    run(*OPS[op])


def test_batches_one_after_the_other() -> None:
    """Without a word about what is dynamic, as most call it: lists fit the batch that they come with."""
    fast, _ = compiled(lambda k, s, n: lkv_ext.evict(k, k, s, [3, 5, 1, 2], lengths=n).k)
    for batch in (1, 2, 3, 5):
        k, scores = tensors(batch, 4, 32)
        lengths = [30 - i for i in range(batch)]
        assert torch.equal(fast(k, scores, lengths), lkv_ext.evict(k, k, scores, [3, 5, 1, 2], lengths=lengths).k)
