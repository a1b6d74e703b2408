"""What torch expects of an op: opcheck, fake tensors, torch.compile, export, autograd, pytrees."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import bits, generator, payload_of, scores_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import lkv_ext
from lkv import reference
from lkv_ext._torch import library

B, H, L, D = 2, 3, 12, 4
SPANS = (dict(), dict(layout="padded"), dict(reserve=2, align=4), dict(capacity=20, sink=1, window=2))


def cache(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(1)
    k, v = (torch.randn(B, H, L, dim, generator=g).to(dtype) for dim in (D, D + 1))
    return k, v, scores_of("normal", [B, H, L])


def op_calls() -> list[tuple[str, tuple]]:
    """One call of every op of the library for each way in, as the public functions make them."""
    recorded: list[tuple[str, tuple]] = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            def call(*arguments: object) -> object:
                recorded.append((name, arguments))
                return getattr(library.ops, name)(*arguments)

            return call

    k, v, scores = cache()
    cu_seqlens = torch.arange(0, B * H * L + 1, L, dtype=torch.int32)
    flat = [t.flatten(0, 2) for t in (k, v, scores)]
    budgets = torch.tensor([[1, 2, 3], [40, 0, 5]])
    patch = pytest.MonkeyPatch()
    for module in ("_torch.evict", "_torch.select", "_torch.gather", "_torch.attend", "_torch.cache_rows"):
        patch.setattr(f"lkv_ext.{module}.ops", Recorder())
    try:
        for span in SPANS:
            lkv_ext.evict(k, v, scores, [1, 2, 3], companions=[scores], lengths=[3, 50], starts=[1, 2], **span)
            index = lkv_ext.select(scores, budgets, **span)
            lkv_ext.gather([k, v], index)
        lkv_ext.evict(*flat, budgets.tolist(), cu_seqlens=cu_seqlens)
        lkv_ext.gather(
            flat[:2], lkv_ext.select(flat[2], budgets.tolist(), cu_seqlens=cu_seqlens), cu_seqlens=cu_seqlens
        )
        lkv_ext.evict_layers([k, k], [v, v], [scores, scores], 4)
        out = lkv_ext.evict(k, v, scores, 4)
        lkv_ext.evict(k, v, scores, 4, out=out)
        lkv_ext.evict_(k.clone(), v.clone(), scores, [1, 2, 3])
        rows = lkv_ext.RaggedCache.empty(B, H, D, dim_v=D + 1, reserve=2 * L)
        rows.append(k, v)
        rows.append(k, v, valid=[3, L])
        rows.attend(torch.ones(B, 2 * H, 5, D))
        pools = [torch.zeros(B * H * L // 2, 2, dim) for dim in (D, D + 1)]
        paged = lkv_ext.RaggedCache.paged(pools, lkv_ext.PageAllocator(len(pools[0])), heads=H, batch=B)
        paged.append(k, v)
        paged.attend(torch.ones(B, 2 * H, 5, D))
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        lkv_ext.evict(k, v, scores, budgets, capacity=9)
    finally:
        patch.undo()
    return recorded


@pytest.mark.parametrize("call", op_calls(), ids=lambda call: call[0])
def test_opcheck(call: tuple[str, tuple]) -> None:
    name, arguments = call
    torch.library.opcheck(getattr(library.ops, name).default, arguments)


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_fake_tensors(span: dict) -> None:
    """Shapes, dtypes and strides without data."""
    k, v, scores = cache()
    real = lkv_ext.evict(k, v, scores, [1, 2, 3], companions=[scores], **span)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (k, v, scores)]
        fake = lkv_ext.evict(*fakes, [1, 2, 3], companions=[fakes[2]], **span)
    for name in ("positions", "lengths", "cu_seqlens"):
        assert getattr(fake, name).shape == getattr(real, name).shape
    for mine, theirs in zip(payload_of(fake), payload_of(real), strict=True):
        assert (mine.shape, mine.dtype, mine.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def compiled(function: object, **options: object) -> tuple[object, object]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_compile_with_host_budgets(span: dict) -> None:
    """Budgets of other values are other sizes: compiled for any after the second."""

    def shrink(k: Tensor, v: Tensor, scores: Tensor, budgets: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        out = lkv_ext.evict(k, v, scores, budgets, **span)
        return out.k * 2, out.v, out.positions

    fast, counter = compiled(shrink)
    arguments = cache()
    frames = []
    for budgets in ([3, 4, 5], [4, 5, 6], [5, 2, 7], [6, 90, 8], [7, 8, -3]):
        for got, want in zip(fast(*arguments, budgets), shrink(*arguments, budgets), strict=True):
            assert torch.equal(bits(got), bits(want))
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 4


def test_compile_with_device_budgets() -> None:
    """Data never changes a size: one graph for all budgets and lengths in tensors."""

    def shrink(k: Tensor, scores: Tensor, budgets: Tensor, lengths: Tensor) -> lkv_ext.RaggedKV:
        return lkv_ext.evict(k, None, scores, budgets, lengths=lengths, capacity=30)

    fast, counter = compiled(shrink)
    k, _, scores = cache()
    for budgets, lengths in (([3, 4, 5], [12, 3]), ([0, 1, 99], [5, 12]), ([9, 9, 9], [12, 12])):
        got = fast(k, scores, torch.tensor(budgets), torch.tensor(lengths))
        want = reference.evict(
            [bits(k)], scores, torch.tensor(budgets).expand(B, H), lengths=torch.tensor(lengths)[:, None].expand(B, H),
            capacity=30, total=30,
        )  # fmt: skip
        assert torch.equal(bits(got.k), want.tensors[0]) and torch.equal(got.positions, want.positions)
        assert int(got.overflow) == want.overflow
    assert counter.frame_count == 1


def test_compile_with_dynamic_lengths() -> None:
    def shrink(k: Tensor, v: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        out = lkv_ext.evict(k, v, scores, k.shape[2] // 3, window=2)
        return out.k, out.v

    fast, counter = compiled(shrink, dynamic=True)
    for tokens in (12, 30, 31, 7):
        k, v, scores = torch.randn(B, H, tokens, D), torch.randn(B, H, tokens, 3), torch.randn(B, H, tokens)
        for got, want in zip(fast(k, v, scores), shrink(k, v, scores), strict=True):
            assert torch.equal(bits(got), bits(want))
    assert counter.frame_count == 1


def test_compile_in_place_and_layers() -> None:
    def shrink(k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
        return lkv_ext.evict_(k, v, scores, [3, 4, 5]).positions

    def joint(k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
        out = lkv_ext.evict_layers([k, v], None, [scores, -scores], [[1, 2, 3], [4, 5, 6]], reserve=1)
        return out.layer(1).k + 1

    k, _, scores = cache()
    mine, theirs = [k.clone(), k.clone()], [k.clone(), k.clone()]
    fast, _ = compiled(shrink)
    assert torch.equal(fast(*mine, scores), shrink(*theirs, scores))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(mine, theirs, strict=True))
    fast, _ = compiled(joint)
    assert torch.equal(bits(fast(k, k, scores)), bits(joint(k, k, scores)))


def test_compile_with_gradients() -> None:
    def loss(k: Tensor, scores: Tensor) -> Tensor:
        return lkv_ext.evict(k, None, scores, [3, 4, 5]).k.square().sum()

    _, _, scores = cache()
    k = torch.randn(B, H, L, D, requires_grad=True)
    fast, _ = compiled(loss)
    (got,), (want,) = (torch.autograd.grad(f(k, scores), k) for f in (fast, loss))
    assert torch.equal(got, want) and bool((want != 0).any())


def test_export() -> None:
    class Shrink(torch.nn.Module):
        def forward(self, k: Tensor, scores: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor]:
            out = lkv_ext.evict(k, None, scores, budgets, capacity=30)
            return out.k, out.lengths

    k, _, scores = cache()
    program = torch.export.export(Shrink(), (k, scores, torch.tensor([3, 4, 5])))
    got = program.module()(k, scores, torch.tensor([5, 1, 2]))
    want = lkv_ext.evict(k, None, scores, [5, 1, 2])
    assert torch.equal(got[1], want.lengths) and torch.equal(bits(got[0][:16]), bits(want.k))


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck(span: dict, ragged: bool) -> None:
    shape = [B * H * L] if ragged else [B, H, L]
    k, v = (torch.randn(*shape, d, dtype=torch.float64, requires_grad=True) for d in (2, 1))
    scores = scores_of("normal", shape)
    where = dict(cu_seqlens=torch.arange(0, B * H * L + 1, L, dtype=torch.int32)) if ragged else dict()
    budgets = [[3, 0, 40], [1, 2, 5]]

    def moved(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = lkv_ext.evict(k, None, scores, budgets, companions=[v], **where, **span)
        return out.k, *out.companions

    assert torch.autograd.gradcheck(moved, (k, v))
    index = lkv_ext.select(scores, budgets, **where, **span)
    assert torch.autograd.gradcheck(lambda *t: tuple(lkv_ext.gather(t, index, **where)), (k, v))


def test_gradients_are_those_of_the_reference() -> None:
    k, v = torch.randn(B, H, L, D, requires_grad=True), torch.randn(B, H, L, D)
    scores = scores_of("ties", [B, H, L])
    budgets = [[3, 0, 40], [1, 2, 5]]
    places = torch.arange(L).expand(B, H, L)
    out = lkv_ext.evict(k, v, scores, budgets, sink=1, reserve=1, companions=[places])
    want = reference.evict([k, places], scores, torch.tensor(budgets), sink=1, reserve=1)
    assert torch.equal(out.companions[0], want.tensors[1])
    weight = torch.randn_like(out.k)
    mine, theirs = (torch.autograd.grad((weight * rows).sum(), k)[0] for rows in (out.k, want.tensors[0]))
    assert torch.equal(mine, theirs)
    with torch.no_grad():
        assert not lkv_ext.evict(k, v, scores, budgets).k.requires_grad


def test_gradients_are_refused_where_there_are_none() -> None:
    k, v, scores = cache()
    out = lkv_ext.evict(k, v, scores, 4)
    k.requires_grad_()
    for op, arguments in (
        (lkv_ext.evict_, dict(k=k, v=v, scores=scores, budgets=4)),
        (lkv_ext.evict_layers, dict(ks=[k], vs=[v], scores=[scores], budgets=4)),
        (lkv_ext.evict, dict(k=k, v=v, scores=scores, budgets=4, out=out)),
    ):
        with pytest.raises(ValueError, match=rf"^lkv_ext\.{op.__name__}: expected .*gradient"):
            op(**arguments)


def test_scores_that_require_gradients_are_read() -> None:
    """A learned score ranks without being differentiated: neither an error nor a graph."""
    k, v, scores = cache()
    learned = scores.clone().requires_grad_()
    out = lkv_ext.evict(k, v, learned, 4)
    assert torch.equal(out.positions, lkv_ext.evict(k, v, scores, 4).positions) and not out.k.requires_grad
    assert torch.equal(lkv_ext.select(learned, 4).positions, out.positions)


@pytest.mark.parametrize("align", [1, 4])
def test_results_are_pytrees(align: int) -> None:
    k, v, scores = cache()
    out = lkv_ext.evict(k, v, scores, 4, companions=[scores], align=align)
    leaves, spec = pytree.tree_flatten(out)
    assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.max_length == 4 and again.align == align and again.k is out.k
    doubled = pytree.tree_map(lambda t: t if t is None else torch.cat([t, t]), out.index)
    assert isinstance(doubled, lkv_ext.RaggedIndex) and len(doubled.positions) == 2 * len(out.positions)


def test_results_are_copied_and_saved() -> None:
    k, v, scores = cache()
    out = lkv_ext.evict(k, v, scores, 4, align=4, reserve=2)
    file = io.BytesIO()
    torch.save(out, file)
    file.seek(0)
    for other in (copy.deepcopy(out), torch.load(file, weights_only=False)):
        assert torch.equal(other.block_table, out.block_table) and torch.equal(bits(other.k), bits(out.k))
        assert other.k.data_ptr() != out.k.data_ptr()
    assert "24 rows" not in repr(out) and "RaggedKV(k=[48, 4]" in repr(out) and "packed" in repr(out)
    assert "max_length=4" in repr(out.index)
