"""Derivatives in both modes and of any order, torch.func, and what autograd must know of writes in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import bits, generator, payload_of, scores_of
from invariants import unwatched
from test_soft_topk import KINDS, fractions
from test_soft_topk import scores_of as soft_scores
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import lkv_ext
from lkv_ext._torch import library

B, H, L, D = 1, 2, 8, 3
SPANS = (dict(), dict(layout="padded"), dict(reserve=2, align=4), dict(capacity=30))
OFFSETS = torch.arange(0, B * H * L + 1, L, dtype=torch.int32)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


SCORES = scores_of("normal", [B, H, L])


def evicted(k: Tensor, v: Tensor, span: dict, ragged: bool = False) -> tuple[Tensor, ...]:
    """With a companion of integers, which moves along and has no derivative."""
    places, scores = torch.arange(L).expand(B, H, L), SCORES
    where = {}
    if ragged:
        k, v, places, scores = (t.flatten(0, 2) for t in (k, v, places, scores))
        where = dict(cu_seqlens=OFFSETS)
    out = lkv_ext.evict(k, v, scores, [3, 9], sink=1, companions=[places], **where, **span)
    return out.k, out.v


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_evict(span: dict, ragged: bool) -> None:
    k, v = rows(B, H, L, D).requires_grad_(), rows(B, H, L, 1, seed=1).requires_grad_()
    op = lambda k, v: evicted(k, v, span, ragged)  # noqa: E731
    assert gradcheck(op, (k, v), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(op, (k, v), check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_slots_behind_the_last_head_have_no_gradient(ragged: bool) -> None:
    """A buffer may be longer than its heads, where only the device knew their sizes."""
    x, scores, where = rows(B, H, L, D), SCORES, {}
    if ragged:
        x, scores, where = x.flatten(0, 2), scores.flatten(), dict(cu_seqlens=OFFSETS)
    index, grads = lkv_ext.select(scores, [3, 5], **where), []
    for slack in (0, 4):
        positions = torch.cat([index.positions, torch.full((slack,), -1, dtype=torch.int32)])
        source = x.clone().requires_grad_()
        (moved,) = lkv_ext.gather([source], replace(index, positions=positions), **where)
        weights = 1 + torch.arange(moved.numel(), dtype=moved.dtype).view(moved.shape)
        grads += torch.autograd.grad((moved * weights).sum(), source)
    assert torch.equal(*grads) and bool(grads[0].any())


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
def test_soft_topk(log: bool) -> None:
    scores = rows(2, 3, 7).requires_grad_()
    k = torch.tensor([[2.3], [5.5]], dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.5, 0.8, 1.3], dtype=torch.float64, requires_grad=True)

    def op(*leaves: Tensor) -> Tensor:
        mask = lkv_ext.soft_topk(*leaves, lengths=torch.tensor([7, 6, 5]), log=log)
        return torch.where(mask == -torch.inf, 0, mask)

    leaves = (scores, k, temperature)
    assert gradcheck(op, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(op, leaves, check_fwd_over_rev=True, check_batched_grad=True)
    assert gradcheck(lambda s: lkv_ext.soft_topk(s[0], 2.5, 0.4, log=log), (scores,), check_forward_ad=True)


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_those_of_the_kernel(kind: str, log: bool) -> None:
    """What is differentiated again is computed otherwise, with the same result on hostile scores."""
    for n in (2, 300, 4100):
        for temperature in (1.0, 0.1):
            scores = soft_scores(kind, [4, n]).requires_grad_()
            k = torch.cat([fractions([3]) * n, torch.zeros(1)]).requires_grad_()
            t = torch.tensor(temperature, requires_grad=True)
            mask = lkv_ext.soft_topk(scores, k, t, log=log)
            upstream = torch.randn(mask.shape, generator=generator(2))
            fast, slow = (
                torch.autograd.grad(mask, (scores, k, t), upstream, retain_graph=True, create_graph=again)
                for again in (False, True)
            )
            for got, want in zip(slow, fast, strict=True):
                assert got.isfinite().all() and want.isfinite().all()
                size = float(upstream.abs().max()) / temperature * (n**0.5 + 10)  # sums of terms that cancel
                assert (got - want).abs().max() <= 2e-5 * size + 1e-3 * want.abs().max()


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
def test_tangents_of_rows_without_a_slope(log: bool) -> None:
    """Missing scores, and rows of which everything or nothing is kept, do not move; nothing is NaN."""
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[0.5, -inf, nan, 1.0, inf, 0.2], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], [-inf] * 6, [nan] * 6])
    for k in (torch.tensor([2.5, 0.0, 2.0, 2.0]), torch.tensor([2.5, 6.0, 2.0, 2.0])):
        leaves = (scores, k, torch.tensor(0.5))
        _, moved = jvp(lambda *x: lkv_ext.soft_topk(*x, log=log), leaves, tuple(torch.ones_like(x) for x in leaves))
        assert moved.isfinite().all() and moved[1:].eq(0).all() and moved[0, [1, 2, 4]].eq(0).all()
        assert moved[0, 0] != 0


def test_functions_of_torch_func_agree() -> None:
    """Forward over reverse, reverse over forward, each over itself; nested in a function of another variable too."""
    scores, k = rows(1, 2, 5), rows(B, H, L, 2)
    index = lkv_ext.select(SCORES, [3, 2])

    def soft(x: Tensor) -> Tensor:
        return (lkv_ext.soft_topk(x, 2.5, 0.5) * scores).sum().square()

    def moved(x: Tensor) -> Tensor:
        return lkv_ext.gather([x], index)[0].pow(3).sum()

    for function, x in ((soft, scores), (moved, k)):
        x = x.clone().requires_grad_()
        want = torch.autograd.functional.hessian(function, x)
        x = x.detach()
        assert (want != 0).any()
        for nest in (hessian(function), jacrev(jacrev(function)), jacfwd(jacfwd(function)), jacrev(jacfwd(function))):
            assert torch.allclose(nest(x), want)
        assert torch.allclose(jacfwd(function)(x), grad(function)(x))
        _, outer = jvp(lambda y: jvp(lambda z: function(y) * z, (x.sum(),), (x.sum(),))[1], (x,), (x,))  # noqa: B023
        assert torch.allclose(outer, (grad(function)(x) * x).sum() * x.sum())


def test_dual_tensors() -> None:
    k = rows(B, H, L, D)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(k, k * 2)
        for out in (
            lkv_ext.evict(dual, k, SCORES, 3).k,
            lkv_ext.evict(k, None, SCORES, 3, companions=[dual]).companions[0],
        ):
            primal, tangent = forward_ad.unpack_dual(out)
            assert torch.equal(tangent, primal * 2)
        assert forward_ad.unpack_dual(lkv_ext.evict(k, k, SCORES, 3).k).tangent is None


def test_functional_call() -> None:
    class Scorer(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return lkv_ext.soft_topk(super().forward(hidden)[..., 0], 3.0, 0.5)

    scorer, hidden = Scorer(4, 1).double(), rows(2, 9, 4)
    weights = dict(scorer.named_parameters())
    got = grad(lambda w: functional_call(scorer, w, (hidden,))[0, 0])({n: w.detach() for n, w in weights.items()})
    scorer(hidden)[0, 0].backward()
    assert all(torch.allclose(got[name], weight.grad) for name, weight in weights.items())


def leaves_of(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return list(out) if isinstance(out, (list, tuple)) else [out.positions, out.lengths, out.cu_seqlens, *(
        payload_of(out) if isinstance(out, lkv_ext.RaggedKV) else [])]  # fmt: skip


CACHE = lkv_ext.evict(rows(B, H, L, D).float(), rows(B, H, L, D).float(), SCORES, 5)
INDEX = lkv_ext.select(SCORES, [3, 2])
BATCHED = {
    "select": (lambda s: lkv_ext.select(s, [3, 2], reserve=1), [(B, H, L)]),
    "evict": (lambda k, s: lkv_ext.evict(k, k, s, 3), [(B, H, L, D), (B, H, L)]),
    "evict with companions": (lambda k, s: lkv_ext.evict(k, None, s, 3, companions=[s]), [(B, H, L, D), (B, H, L)]),
    "evict of shared scores": (lambda k: lkv_ext.evict(k, k, SCORES, [3, 2]), [(B, H, L, D)]),
    "evict_layers": (lambda k, s: lkv_ext.evict_layers([k, k], None, [s, -s], 3), [(B, H, L, D), (B, H, L)]),
    "gather": (lambda k: lkv_ext.gather([k, SCORES], INDEX), [(B, H, L, D)]),
    "select and gather": (lambda k, s: lkv_ext.gather([k], lkv_ext.select(s, 3)), [(B, H, L, D), (B, H, L)]),
    "attend": (lambda q: lkv_ext.attend(q, CACHE), [(B, 2 * H, 2, D)]),
    "soft_topk": (lambda s, k: lkv_ext.soft_topk(s, k, 0.5), [(B, H, L), (H,)]),
    "log soft_topk": (lambda s: lkv_ext.soft_topk(s, 3, 0.5, [[8, 5]], log=True), [(B, H, L)]),
    "grad of evict": (grad(lambda k, s: lkv_ext.evict(k, k, s, 3).k.square().sum()), [(B, H, L, D), (B, H, L)]),
    "grad of soft_topk": (grad(lambda s: lkv_ext.soft_topk(s, 3, 0.5).square().sum()), [(B, H, L)]),
}


@pytest.mark.parametrize("name", BATCHED)
def test_vmap(name: str) -> None:
    """As a loop over the samples, whatever axis these are in."""
    op, shapes = BATCHED[name]
    samples = 3
    arguments = [rows(samples, *shape, seed=i).float() for i, shape in enumerate(shapes)]
    loop = [leaves_of(op(*(t[i] for t in arguments))) for i in range(samples)]
    want = [torch.stack(parts) for parts in zip(*loop, strict=True)]
    for axis in (0, 1):
        there = [t.movedim(0, axis).contiguous() for t in arguments]
        got = vmap(lambda *args: leaves_of(op(*args)), in_dims=axis)(*there)
        for mine, theirs in zip(got, want, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "evict_": lambda k: lkv_ext.evict_(k, None, SCORES, 3),
    "evict_layers": lambda k: lkv_ext.evict_layers([k], None, [SCORES], 3),
    "attend": lambda k: lkv_ext.attend(k, CACHE),
    "RaggedCache.append": lambda k: lkv_ext.RaggedCache.empty(B, H, D).append(k, k),
    "evict": lambda k: lkv_ext.evict(k, None, SCORES, 3, out=lkv_ext.evict(k.detach(), None, SCORES, 3)),
}


@pytest.mark.parametrize("op", REFUSED)
def test_where_there_is_none(op: str) -> None:
    k = rows(B, H, L, D).float()
    expected = pytest.raises(ValueError, match=rf"^lkv_ext\.{op}: expected .*(tangents, got some: [a-z ]+$|gradient)")
    with expected, forward_ad.dual_level():
        REFUSED[op](forward_ad.make_dual(k, k))
    with expected:
        jvp(lambda x: jvp(lambda y: REFUSED[op](x) or y, (k,), (k,))[1], (k,), (k,))
    with expected:
        grad(lambda x: REFUSED[op](x) and x.sum())(k)
    with forward_ad.dual_level():  # a level alone is no reason
        if op != "evict":
            REFUSED[op](k)
    if op in ("evict_", "RaggedCache.append"):
        with pytest.raises(RuntimeError, match=op):
            vmap(REFUSED[op])(k[None])


def index_of(out: lkv_ext.RaggedKV) -> list[Tensor]:
    return [out.positions, out.lengths, out.cu_seqlens]


def into(k: Tensor, target: Tensor) -> None:
    out = lkv_ext.evict(k, k, SCORES, L)
    out.k = target.view(out.k.shape)
    lkv_ext.evict(k, k, SCORES, L, out=out)


def layers_into(k: Tensor, target: Tensor) -> None:
    out = lkv_ext.evict_layers([k], [k], [SCORES], L)
    out.v = target.view(out.v.shape)
    lkv_ext.evict_layers([k], [k], [SCORES], L, out=out)


def append_into(k: Tensor, target: Tensor) -> None:
    cache = lkv_ext.RaggedCache.empty(B, H, D, reserve=L, dtype=k.dtype)
    cache.v = target.view(cache.v.shape)
    with unwatched():  # of this v, caches know nothing
        cache.append(k[:, :, :2], k[:, :, :2])


def raw_out(k: Tensor, target: Tensor) -> None:
    out = lkv_ext.evict(k, k, SCORES, L)
    library.ops.evict_out([target.view(out.k.shape), out.v, *index_of(out)], [k, k], [SCORES], [L], B * H * L)


def raw_append(k: Tensor, target: Tensor) -> None:
    cache = lkv_ext.RaggedCache.empty(B, H, D, reserve=L, dtype=k.dtype)
    buffers = [target.view(cache.k.shape), cache.v]
    library.ops.append_(buffers, cache.positions, cache.lengths, cache.cu_seqlens, [k, k], 0)


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "evict_": lambda k, target: lkv_ext.evict_(target, k.clone(), SCORES, 3),
    "evict_ companions": lambda k, target: lkv_ext.evict_(k.clone(), None, SCORES, 3, companions=[target]),
    "evict out": into,
    "evict_layers out": layers_into,
    "append": append_into,
    "raw evict_": lambda k, target: library.ops.evict_([k.clone(), target], [SCORES], [3], B * H * 3),
    "raw evict_out": raw_out,
    "raw append_": raw_append,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_a_stale_backward_raises(write: str, mode: type) -> None:
    weight = rows(B, H, L, D).requires_grad_()
    kept = weight * 2
    loss = kept.square().sum()  # saves `kept`
    source = rows(B, H, L, D, seed=1)
    before = source._version
    with mode():
        WRITES[write](source, kept.detach())
    assert source._version == before  # what is only read is not marked
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("write", WRITES)
def test_what_may_not_be_written_is_refused(write: str) -> None:
    """A leaf that requires a gradient, and a view of one; without gradients both may be written, as in torch."""
    source = rows(B, H, L, D, seed=1)
    leaf = rows(B, H, L, D).requires_grad_()
    before = leaf.detach().clone()
    for target in (leaf, leaf[:], leaf.view(B, H, L, D)):
        with pytest.raises((ValueError, RuntimeError), match="gradient"):
            WRITES[write](source, target)
        assert torch.equal(bits(leaf.detach()), bits(before))
    if not write.startswith("raw"):  # the ops themselves do not know
        with pytest.raises(ValueError, match=r"^lkv_ext\..*gradient"):
            WRITES[write](source, leaf * 1)
    with torch.no_grad():
        WRITES[write](source, leaf)
    assert not torch.equal(leaf.detach(), before)


@pytest.mark.parametrize("write", WRITES)
def test_tensors_of_inference_mode_stay_there(write: str) -> None:
    source = rows(B, H, L, D, seed=1)
    with torch.inference_mode():
        target = rows(B, H, L, D)
        WRITES[write](source, target)
    with pytest.raises((ValueError, RuntimeError), match="inference mode"):
        WRITES[write](source, target)


def test_indices_are_marked_too() -> None:
    k = rows(B, H, L, D)
    out = lkv_ext.evict(k, k, SCORES, 3)
    cache = lkv_ext.RaggedCache.empty(B, H, D, reserve=L, dtype=k.dtype)
    written = [*index_of(out), cache.positions, cache.lengths]
    before = [t._version for t in written]
    lkv_ext.evict(k, k, SCORES, 3, out=out)
    cache.append(k, k)
    assert all(t._version > version for t, version in zip(written, before, strict=True))
