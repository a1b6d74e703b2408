"""soft_topk and its gradients against float64, over shapes, types, hostile scores and instruction sets."""

from __future__ import annotations

import pytest
import torch
from cases import generator
from test_isa import run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lkv_ext
from lkv import reference
from lkv_ext._torch import library

INF, NAN = torch.inf, torch.nan
SIZES = (1, 2, 15, 16, 17, 63, 300, 1023, 1025, 4100)
KINDS = ("normal", "ties", "constant", "far", "skewed", "missing")


def scores_of(kind: str, shape: list[int], seed: int = 0) -> Tensor:
    g = generator(seed + shape[-1])
    scores = torch.randn(shape, generator=g)
    if kind == "ties":
        scores = scores.round()
    elif kind == "constant":
        scores = torch.full(shape, 0.3)
    elif kind == "far":
        scores = scores * 1e-2 + 100 * (torch.rand(shape, generator=g) < 0.2)
    elif kind == "skewed":
        scores = torch.exp(3 * scores)
    elif kind == "missing":
        draw = torch.rand(shape, generator=g)
        scores = torch.where(draw < 0.1, NAN, torch.where(draw < 0.3, -INF, scores))
    return scores


def fractions(shape: list[int]) -> Tensor:
    return torch.tensor([0.053, 0.507, 0.931]).repeat(shape[0])[: shape[0]]


def check(got: Tensor, want: Tensor, log: bool, tolerance: float = 2e-5) -> None:
    """Masks agree as far as a sum that is right to 1e-6 tells tau, and logarithms as far as the rounding of u goes."""
    assert not got.isnan().any()
    got, want = got.detach().double().cpu(), want.detach()
    assert torch.equal(got == -INF, want == -INF)
    m = want.exp() if log else want
    slack = 4e-6 * m.sum(-1, keepdim=True) / (m * (1 - m)).sum(-1, keepdim=True).clamp_min(1e-9)
    if log:
        size = torch.where(want == -INF, 0, want).abs()
        assert ((got - want).nan_to_num(0, 0, 0).abs() <= tolerance * (1 + size) + (1 - m) * slack).all()
    else:
        assert ((got - want).abs() <= tolerance + m * (1 - m) * slack).all()


def compare(scores: Tensor, k: Tensor, temperature: float, log: bool, device: str = "cpu", **options) -> None:
    """Forward and backward beside the reference."""
    upstream = torch.randn(scores.shape, generator=generator(3))
    results = []
    for op, where in ((lkv_ext.soft_topk, device), (reference.soft_topk, "cpu")):
        leaves = [t.clone().to(where).requires_grad_() for t in (scores, k, torch.tensor(temperature))]
        lengths = {name: t.to(where) for name, t in options.items()}
        mask = op(*leaves, log=log, **lengths)
        there = torch.where(mask.detach() == -INF, 0, mask)
        grads = torch.autograd.grad(there, leaves, upstream.to(there), allow_unused=True)
        results.append((mask, [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]))
    (mine, grads), (want, wanted) = results
    check(mine, want, log)
    for name, got, exact in zip(("scores", "k", "temperature"), grads, wanted, strict=True):
        got, exact = got.double().cpu(), exact.double()
        assert got.isfinite().all(), name
        # Sums in float32 of terms that cancel: relative to those.
        size = upstream.abs().max() * (1 if name == "k" else 1 / temperature) * (scores.shape[-1] ** 0.5 + 10)
        assert (got - exact).abs().max() <= 2e-5 * size + 1e-3 * exact.abs().max(), name


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity(device: str, kind: str, log: bool) -> None:
    for n in SIZES:
        for temperature in (1.0, 0.1):
            scores = scores_of(kind, [3, n])
            compare(scores, fractions([3]) * n, temperature, log, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(device: str, dtype: torch.dtype) -> None:
    """float32 inside, the gradient rounded once."""
    scores = scores_of("normal", [3, 1111]).to(dtype)
    k = fractions([3]) * 1111
    for log in (False, True):
        half, full = scores.to(device).requires_grad_(), scores.float().to(device).requires_grad_()
        mine, theirs = (lkv_ext.soft_topk(t, k.to(device), 0.2, log=log) for t in (half, full))
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)
        upstream = torch.randn(mine.shape, generator=generator(1)).to(device)
        (got,), (want,) = (torch.autograd.grad(m, t, upstream) for m, t in ((mine, half), (theirs, full)))
        assert got.dtype == dtype and torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("kind", ["normal", "skewed", "far", "ties"])
def test_long_rows_sum_to_k(device: str, kind: str, temperature: float) -> None:
    scores = scores_of(kind, [2, 131072]).to(device)
    for k in (0.3, 1.5, 77.7, 19660.8, 131000.25):
        mask = lkv_ext.soft_topk(scores, k, temperature)
        assert not mask.isnan().any() and float(mask.amin()) >= 0 and float(mask.amax()) <= 1
        assert (mask.double().sum(-1) - k).abs().max() <= 1e-5 * k
        log = lkv_ext.soft_topk(scores, k, temperature, log=True)
        assert log.isfinite().all() and float(log.amax()) <= 0
        assert (log.double().exp().sum(-1) - k).abs().max() <= 2e-5 * k


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
def test_gradcheck(log: bool) -> None:
    scores = torch.randn(2, 3, 9, dtype=torch.float64, generator=generator(1), requires_grad=True)
    k = torch.tensor([[2.3], [6.5]], dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor([0.5, 0.8, 1.3], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([9, 8, 7])

    def op(*leaves: Tensor) -> Tensor:
        mask = lkv_ext.soft_topk(*leaves, lengths=lengths, log=log)
        return torch.where(mask == -INF, 0, mask)

    assert torch.autograd.gradcheck(op, (scores, k, temperature))
    assert torch.autograd.gradcheck(lambda s: lkv_ext.soft_topk(s[0], 2.5, 0.4, log=log), (scores,))


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
def test_nothing_to_decide(device: str, log: bool) -> None:
    """k at its ends: constant masks, no gradient, nothing that is not finite."""
    scores = scores_of("normal", [6, 50]).to(device).requires_grad_()
    k = torch.tensor([0.0, -3.0, 50.0, 99.0, NAN, -INF], device=device, requires_grad=True)
    temperature = torch.tensor(0.3, device=device, requires_grad=True)
    mask = lkv_ext.soft_topk(scores, k, temperature, log=log)
    none, everything = (-1e4, 0.0) if log else (0.0, 1.0)
    assert mask[:, 0].tolist() == [none, none, everything, everything, none, none]
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    for grad in torch.autograd.grad(mask.sum(), (scores, k, temperature)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_rows_of_one_score_have_any_stride(device: str) -> None:
    """No step is made along that axis."""
    every = scores_of("normal", [4, 5, 3]).to(device)
    one, k = every[..., 1:2], torch.tensor([-1.0, 0.0, 0.3, 0.8, 2.0], device=device)
    assert one.stride(-1) == 1 and every[..., ::3].stride(-1) == 3
    for scores in (one, every[..., ::3]):
        for log in (False, True):
            assert torch.equal(
                lkv_ext.soft_topk(scores, k, 0.5, log=log), lkv_ext.soft_topk(scores.contiguous(), k, 0.5, log=log)
            )


@pytest.mark.parametrize("gap", [40, 60, 120])
def test_a_threshold_in_a_wide_gap_has_next_to_no_gradient(device: str, gap: int) -> None:
    """Many temperatures between the k highest scores and the others: nothing moves such a mask."""
    scores = torch.zeros(2, 64, device=device)
    scores[:, ::2] = 0.1 * gap
    leaves = scores.requires_grad_(), torch.tensor([32.0, 32.0], device=device, requires_grad=True)
    mask = lkv_ext.soft_topk(*leaves, 0.1)
    for grad in torch.autograd.grad(mask, leaves, torch.ones_like(mask)):
        assert float(grad.abs().max()) <= 0.01


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
def test_float64_keeps_its_digits(log: bool) -> None:
    """All scores higher by as much change nothing: their gradients sum to zero, beyond what float32 tells."""
    scores = torch.randn(3, 200, dtype=torch.float64, generator=generator(8), requires_grad=True)
    mask = lkv_ext.soft_topk(scores, 40.5, 0.3, log=log)
    upstream = torch.rand(3, 200, dtype=torch.float64, generator=generator(9))
    (grad,) = torch.autograd.grad(mask, scores, upstream)
    assert float(grad.sum(-1).abs().max()) <= 1e-9 * float(grad.abs().sum())


def test_scores_that_are_not_there(device: str) -> None:
    row = [0.5, -INF, NAN, 1.0, INF, -0.25, 0.125]
    scores = torch.tensor([row, row, row, [-INF] * 7, [NAN] * 7, [INF] * 7], device=device).requires_grad_()
    k = torch.tensor([2.5, 0.5, 6.0, 2.0, 2.0, 2.0], device=device)
    for log in (False, True):
        mask = lkv_ext.soft_topk(scores, k, 0.5, log=log)
        values = mask.exp() if log else mask
        sums = [2.5, 1.0, 5.0, 0.0, 0.0, 7.0]
        assert torch.allclose(values.sum(-1).cpu(), torch.tensor(sums), atol=1e-5)
        assert values[:3, [1, 2]].eq(0).all() and values[:3, 4].eq(1).all() and not mask.isnan().any()
        upstream = torch.where(values == 0, INF, 1.0)  # whatever comes in for scores that are not there
        (grad,) = torch.autograd.grad(mask, scores, upstream if not log else torch.ones_like(mask))
        assert grad.isfinite().all() and grad[:3, [1, 2, 4]].eq(0).all() and grad[3:].eq(0).all()


def test_largest_scores(device: str) -> None:
    largest = torch.finfo(torch.float32).max
    for row in ([largest, -largest, 0.0, 1.0], [largest, largest, largest, -largest], [1e-45, 0.0, -1e-45, 0.0]):
        for log in (False, True):
            mask = lkv_ext.soft_topk(torch.tensor([row], device=device), 1.5, 0.01, log=log)
            assert not mask.isnan().any()


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
@pytest.mark.parametrize("far", [torch.finfo(torch.float32).min, 3e38, -1e30, 1e25, -1e9, 1e5])
@pytest.mark.parametrize("near", [0.0, -70.0, 3000.0])
def test_scores_of_all_magnitudes(device: str, far: float, near: float, log: bool) -> None:
    """Who masks scores often puts the least float there: that is a score like any other, and the sum is k."""
    for n in (9, 100, 2047, 3000):
        scores = near + scores_of("normal", [3, n])
        scores[:, ::3] = far
        ends = -(-n // 3)  # scores that are far, between which and the others no tau is needed
        k = torch.tensor([0.1, 0.5, 0.95]) * (n - ends) + (ends if far > 0 else 0)
        for temperature in (1.0, 0.05):
            mask = lkv_ext.soft_topk(scores.to(device), k.to(device), temperature, log=log).double().cpu()
            mask = mask.exp() if log else mask
            assert ((mask.sum(-1) - k).abs() <= 1e-4 * k).all()
            check(mask, reference.soft_topk(scores, k, temperature), False, 1e-3)


def test_temperatures_below_the_least(device: str) -> None:
    scores = scores_of("normal", [4, 40]).to(device)
    mask = lkv_ext.soft_topk(scores, 7.0, torch.tensor([0.0, -1.0, NAN, 1e-30], device=device))
    want = torch.zeros_like(scores).scatter_(-1, scores.topk(7).indices, 1.0)
    assert torch.allclose(mask, want)


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
def test_lengths(device: str, log: bool) -> None:
    scores = scores_of("normal", [4, 700])
    scores[1, 650:] = NAN
    lengths = torch.tensor([700, 650, 3, 0])
    k = torch.tensor([100.0, 60.0, 2.5, 5.0])
    compare(scores, k, 0.3, log, device, lengths=lengths)
    compare(scores, k, 0.3, log, device, lengths=lengths.int())
    cut = lkv_ext.soft_topk(scores[:1, :300].to(device), 50.0, 0.3, log=log)
    whole = lkv_ext.soft_topk(scores[:1].to(device), 50.0, 0.3, [300], log=log)
    assert torch.equal(whole[:, :300], cut) and (whole[:, 300:] == (-INF if log else 0)).all()
    beyond = lkv_ext.soft_topk(scores[:1].to(device), 50.0, 0.3, torch.tensor([2**40], device=device), log=log)
    assert torch.equal(beyond, lkv_ext.soft_topk(scores[:1].to(device), 50.0, 0.3, log=log))
    out = lkv_ext.soft_topk(scores[:1].to(device), 50.0, 0.3, torch.tensor([-7], device=device))
    assert torch.equal(out, torch.zeros_like(out))


def test_strides_and_broadcasting(device: str) -> None:
    scores = scores_of("normal", [2, 3, 4, 200]).to(device)
    k = (torch.rand(3, 1, generator=generator(5)) * 100 + 20).to(device)
    temperature = (torch.rand(2, 1, 4, generator=generator(6)) + 0.1).to(device)
    want = lkv_ext.soft_topk(scores, k, temperature)
    for how in (scores.transpose(0, 2).contiguous().transpose(0, 2), scores.repeat_interleave(2, 1)[:, ::2]):
        assert not how.is_contiguous()
        assert torch.equal(lkv_ext.soft_topk(how, k, temperature), want)
    row = lkv_ext.soft_topk(scores[1, 2, 3], float(k[2]), float(temperature[1, 0, 3]))
    assert torch.allclose(row, want[1, 2, 3], atol=1e-6)
    deep = lkv_ext.soft_topk(scores.view(1, 2, 1, 3, 1, 4, 200), k[:, None], temperature.view(2, 1, 1, 1, 4))
    assert deep.shape == (1, 2, 1, 3, 1, 4, 200) and torch.equal(deep.view(want.shape), want)
    same = scores[:1, :1, :1].expand(2, 3, 4, 200)
    assert torch.equal(lkv_ext.soft_topk(same, 9, 1)[1, 2, 3], lkv_ext.soft_topk(scores[0, 0, 0], 9, 1))


def test_empty(device: str) -> None:
    for shape in ([0], [0, 5], [3, 0], [2, 0, 7]):
        scores = torch.zeros(shape, device=device, requires_grad=True)
        mask = lkv_ext.soft_topk(scores, 2.0, 0.5)
        assert mask.shape == scores.shape
        assert torch.autograd.grad(mask.sum(), scores)[0].shape == scores.shape


def test_result_does_not_depend_on_threads() -> None:
    scores, k = scores_of("normal", [7, 9000]), torch.linspace(10, 8000, 7)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(lkv_ext.soft_topk(scores, k, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


ON_ISA = """
import sys
import torch
import lkv_ext
from test_soft_topk import KINDS, SIZES, compare, fractions, scores_of

assert lkv_ext.build_info()["cpu_isa"] == sys.argv[1]
for n in SIZES:
    for i, kind in enumerate(KINDS):
        for log in (False, True):
            compare(scores_of(kind, [3, n], i), fractions([3]) * n, (1.0, 0.1)[i % 2], log)
for dtype in (torch.float16, torch.bfloat16):
    scores = torch.randn(3, 5000).to(dtype)
    mask = lkv_ext.soft_topk(scores, 700.5, 0.02)
    assert (mask.double().sum(-1) - 700.5).abs().max() <= 0.01
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_instruction_sets(isa: str) -> None:
    result = run(isa, ON_ISA, isa)
    if f"LKV_CPU_ISA={isa} is not available here" in result.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scores=3.0), r"expected scores of shape \[..., n\], got float"),
        (dict(scores=torch.tensor(1.0)), r"expected scores of shape \[..., n\], got \[\]"),
        (
            dict(scores=torch.zeros(2, 8).int()),
            "expected scores of dtype float32, float16, bfloat16 or float64, got int32",
        ),
        (dict(scores=torch.zeros(2, 16)[:, ::2]), "expected scores contiguous in the last axis, got strides"),
        (dict(scores=torch.zeros(2, 1).expand(2, 8)), "expected scores contiguous in the last axis, got strides"),
        (dict(k="all"), "expected k as a number or a tensor, got str"),
        (dict(k=torch.zeros(3)), r"expected k that broadcasts to the rows of scores \[2\], got \[3\]"),
        (dict(k=torch.zeros(1, 2)), r"expected k that broadcasts to the rows of scores \[2\], got \[1, 2\]"),
        (dict(k=torch.zeros(2).bool()), "expected k of a real dtype, got torch.bool"),
        (dict(temperature=None), "expected temperature as a number or a tensor, got NoneType"),
        (dict(temperature=0), "expected temperature above 0, got 0"),
        (dict(temperature=NAN), "expected temperature above 0, got nan"),
        (dict(temperature=torch.zeros(2, 2)), "expected temperature that broadcasts"),
        (dict(lengths=torch.zeros(2)), "expected lengths of dtype int32 or int64, got float32"),
        (dict(lengths=[1, 2, 3]), r"expected lengths that broadcasts to the rows of scores \[2\], got \[3\]"),
    ],
    ids=str,
)
def test_errors(changes: dict[str, object], message: str) -> None:
    arguments = dict(scores=torch.zeros(2, 8), k=3, temperature=0.5) | changes
    with pytest.raises((ValueError, TypeError), match=f"^lkv_ext.soft_topk: {message}"):
        lkv_ext.soft_topk(**arguments)


@pytest.mark.parametrize("log", [False, True], ids=["mask", "log"])
def test_opcheck(log: bool) -> None:
    scores, k = torch.randn(2, 3, 8), torch.rand(3) * 8
    lengths = torch.tensor([[8], [5]])
    forward = (scores, k, 0.0, None, 0.5, lengths, log)
    torch.library.opcheck(library.ops.soft_topk.default, forward)
    mask, weights = library.ops.soft_topk(*forward)
    for element, to_scores, to_temperature in ((0, True, True), (2, True, False), (1, False, True)):
        backward = (torch.randn(2, 3, 8), mask, weights, None, 0.5, lengths, element, log, to_scores, to_temperature)
        torch.library.opcheck(library.ops.soft_topk_backward.default, backward)


def test_compile() -> None:
    """One graph for all k and temperatures in tensors, with gradients."""

    def loss(scores: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
        return (lkv_ext.soft_topk(scores, k, temperature, log=True) * scores.detach()).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(loss, backend=counter, fullgraph=True)
    for seed in range(3):
        leaves = [scores_of("normal", [2, 30], seed), torch.rand(2) * 30, torch.rand(()) + 0.1]
        leaves = [t.requires_grad_() for t in leaves]
        for got, want in zip(
            torch.autograd.grad(fast(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
        ):
            assert torch.equal(got, want)
    assert counter.frame_count == 1


def test_no_mask_is_subnormal() -> None:
    """A hundred cycles each on many CPUs, there and in everything that is made of them: far below tau masks are 0."""
    for length in (1000, 5000):  # a short row, and one of which a part is looked at first
        mask = lkv_ext.soft_topk(torch.linspace(-1, 1, length), length // 2, 0.005)
        assert (mask == 0).any() and mask[mask > 0].min() >= torch.finfo(torch.float32).tiny
