"""make_fx and FakeTensorMode: budgets and lengths in tensors stay inputs of what is traced, and are never read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import bits
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lkv_ext

H, D = 3, 4


def inputs(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    k, scores = torch.randn(batch, H, tokens, D, generator=g), torch.randn(batch, H, tokens, generator=g)
    return k, scores, torch.tensor([2, 5, 3]) + seed, tokens - seed - torch.arange(batch)


def again(k: Tensor, scores: Tensor, budgets: Tensor, lengths: Tensor) -> Tensor:
    kv = lkv_ext.evict(k, k, scores, 7)
    rest = dict(cu_seqlens=kv.cu_seqlens, lengths=kv.lengths, capacity=80)
    return lkv_ext.evict(kv.k, kv.v, kv.k[:, 0], budgets, **rest).k


def ragged_by_size(k: Tensor, scores: Tensor, budgets: Tensor, lengths: Tensor) -> Tensor:
    kv = lkv_ext.evict(k, k, scores, 7)
    return lkv_ext.evict(kv.k, kv.v, kv.k[:, 0], k.shape[2] // 3, cu_seqlens=kv.cu_seqlens, lengths=kv.lengths).k


def cached(k: Tensor, scores: Tensor, budgets: Tensor, lengths: Tensor) -> Tensor:
    cache = lkv_ext.RaggedCache.empty(k.shape[0], k.shape[1], D, reserve=64)
    cache.append(k, k, valid=lengths)
    cache.evict(cache.k[:, 0], budgets, max_budget=9)
    return cache.lengths


OPS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "select": lambda k, s, b, n: lkv_ext.select(s, b, capacity=80, starts=n // 2).positions,
    "evict": lambda k, s, b, n: lkv_ext.evict(k, k, s, b, lengths=n, capacity=80).k,
    "padded": lambda k, s, b, n: lkv_ext.evict(k, None, s, b, max_budget=6, layout="padded").k,
    "device lengths": lambda k, s, b, n: lkv_ext.evict(k, k, s, [3, 4, 5], lengths=n).v,
    "sizes": lambda k, s, b, n: (
        lkv_ext.evict(k, k, s, [k.shape[2] // 3] * 3, window=k.shape[2] // 9, reserve=k.shape[0]).k
    ),
    "evict_": lambda k, s, b, n: lkv_ext.evict_(k, None, s, b, max_budget=9).lengths,
    "evict_layers": lambda k, s, b, n: (
        lkv_ext.evict_layers([k, -k], None, [s, s], b[None] + b[:2, None], capacity=200).k
    ),
    "ragged": again,
    "ragged by size": ragged_by_size,
    "gather": lambda k, s, b, n: lkv_ext.gather([k], lkv_ext.select(s, b, capacity=80))[0],
    "attend": lambda k, s, b, n: lkv_ext.attend(k[:, :, :2], lkv_ext.evict(k, k, s, b, capacity=80)),
    "soft_topk": lambda k, s, b, n: lkv_ext.soft_topk(s, b.float(), 0.5, lengths=n[:, None]),
    "cache": cached,
}


def same(got: Tensor, want: Tensor) -> bool:
    """Traced, a capacity is the size of an output; eagerly its rows are counted."""
    if got.dim() == 1 or got.shape[1:] == want.shape[1:]:
        return torch.equal(bits(got[: want.shape[0]]), bits(want))
    return torch.equal(bits(got[:, :, : want.shape[2]]), bits(want))


@pytest.mark.parametrize("op", OPS)
def test_make_fx(op: str) -> None:
    """One trace serves other values in all modes, and other batches and lengths where it is symbolic."""
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(OPS[op], tracing_mode=mode)(*inputs(2, 12))
        others = [inputs(2, 12, seed=1)] + ([inputs(4, 20, seed=2)] if mode == "symbolic" else [])
        for other in others:
            assert same(graph(*(t.clone() for t in other)), OPS[op](*(t.clone() for t in other))), mode


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op: str) -> None:
    for env in (None, ShapeEnv()):
        with FakeTensorMode(shape_env=env) as mode:
            fake = OPS[op](*(mode.from_tensor(t) for t in inputs(2, 12)))
        real = make_fx(OPS[op])(*inputs(2, 12))(*inputs(2, 12))
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_sizes_that_only_the_values_tell_are_refused() -> None:
    k, scores, budgets, _ = inputs(2, 12)
    expected = pytest.raises(
        ValueError, match="lkv_ext.evict: expected capacity or max_budget with budgets in a tensor"
    )
    for mode in ("real", "fake", "symbolic"):
        with expected:
            make_fx(lambda b: lkv_ext.evict(k, k, scores, b).k, tracing_mode=mode)(budgets)
    with expected, FakeTensorMode() as mode:
        lkv_ext.evict(mode.from_tensor(k), None, mode.from_tensor(scores), mode.from_tensor(budgets))


def test_a_plan_of_values_that_are_not_there_is_refused() -> None:
    budgets = inputs(2, 12)[2]
    for name, given in (("budgets", (budgets,)), ("lengths", (3, budgets))):
        expected = pytest.raises(ValueError, match=f"lkv_ext.plan: expected {name} that can be read now")
        with FakeTensorMode() as mode, expected:
            lkv_ext.plan(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given))
    with FakeTensorMode():
        copies = lkv_ext.plan([3, 4], [[5, 6]])
    assert (copies.budgets, copies.lengths, list(copies.lengths_tensor.shape)) == ([3, 4], [5, 6], [1, 2])


def test_export_of_any_batch_and_length() -> None:
    class Shrink(torch.nn.Module):
        def forward(self, k: Tensor, scores: Tensor, budgets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            out = lkv_ext.evict(k, k, scores, budgets, lengths=lengths, capacity=80, sink=1)
            return out.k, out.lengths

    batch, tokens = torch.export.Dim("batch", max=64), torch.export.Dim("tokens", max=4096)
    dims = ({0: batch, 2: tokens}, {0: batch, 2: tokens}, None, {0: batch})
    for strict in (False, True):
        program = torch.export.export(Shrink(), inputs(2, 12), dynamic_shapes=dims, strict=strict)
        for other in (inputs(2, 12, seed=1), inputs(5, 31, seed=2)):
            for got, want in zip(program.module()(*other), Shrink()(*other), strict=True):
                assert same(got, want)
