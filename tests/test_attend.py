"""attend against float64, over shapes, types, masks and instruction sets."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import generator
from test_isa import run
from torch import Tensor

import lkv_ext
from lkv import reference

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# B, H, query heads per KV head, queries, D, Dv, longest head
SHAPES = [
    (1, 8, 4, 1, 128, 128, 700),
    (2, 3, 7, 5, 64, 64, 300),
    (1, 2, 1, 33, 80, 40, 200),
    (2, 2, 3, 70, 20, 24, 150),
    (1, 1, 2, 3, 256, 256, 90),
    (1, 2, 4, 1, 7, 3, 65),
    (1, 1, 5, 2, 576, 512, 64),
    (1, 2, 2, 1, 16, 16, 5000),
]


def ragged(batch: int, heads: int, dim: int, dim_v: int, longest: int, dtype: torch.dtype) -> lkv_ext.RaggedKV:
    """Heads of 0 to `longest` rows in spans with NaN for slack, so that a read behind a head shows."""
    g = generator(longest + dim)
    lengths = torch.randint(longest + 1, (batch, heads), generator=g, dtype=torch.int32)
    lengths[0, 0], lengths[-1, -1] = 0 if batch > 1 else longest, longest
    spans = lengths.flatten() + torch.randint(5, (batch * heads,), generator=g, dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), spans.cumsum(0).int()])
    k, v = (torch.randn(int(offsets[-1]), d, generator=g).to(dtype) for d in (dim, dim_v))
    for begin, end, length in zip(offsets[:-1], offsets[1:], lengths.flatten(), strict=True):
        k[begin + length : end] = v[begin + length : end] = torch.nan
    return lkv_ext.RaggedKV(k, v, (), torch.zeros(len(k), dtype=torch.int32), lengths, offsets, longest)


def queries(batch: int, heads: int, n: int, dim: int, dtype: torch.dtype) -> Tensor:
    """`[B, Hq, n, D]` as models hand them over: a transposed view."""
    return torch.randn(batch, n, heads, dim, generator=generator(n)).to(dtype).transpose(1, 2)


def sinks_of(heads: int) -> Tensor:
    """`[Hq]`: none, far from all logits, and learned ones."""
    sinks = torch.randn(heads, generator=generator(heads)) * 3
    sinks[0] = -torch.inf
    if heads > 2:
        sinks[-2:] = torch.tensor([40.0, -40.0])
    return sinks


def error_of(q: Tensor, kv: lkv_ext.RaggedKV, got: Tensor, **options) -> float:
    want = reference.attend(q, kv.k, kv.v, kv.cu_seqlens, kv.lengths, **options)
    return float((got.double().cpu() - want).abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, group, n, dim, dim_v, longest = shape
    kv = ragged(batch, heads, dim, dim_v, longest, dtype)
    q = queries(batch, heads * group, n, dim, dtype)
    there = SimpleNamespace(
        **{name: getattr(kv, name).to(device) for name in ("k", "v", "cu_seqlens", "lengths")}, max_length=longest
    )
    sinks = sinks_of(heads * group)
    for options in (dict(causal=True), dict(causal=False, scale=0.3), dict(causal=True, softcap=2.0, sinks=sinks)):
        moved = {name: value.to(device) if name == "sinks" else value for name, value in options.items()}
        got = lkv_ext.attend(q.to(device), there, backend="lkv", **moved)
        assert got.shape == (batch, heads * group, n, dim_v) and got.dtype == dtype
        assert got.transpose(1, 2).is_contiguous()
        assert error_of(q, kv, got, **options) <= TOLERANCE[dtype]


ON_ISA = """
import sys
import torch
import lkv_ext
from test_attend import SHAPES, TOLERANCE, error_of, queries, ragged, sinks_of

assert lkv_ext.build_info()["cpu_isa"] == sys.argv[1]
for batch, heads, group, n, dim, dim_v, longest in SHAPES:
    for dtype, tolerance in TOLERANCE.items():
        kv, q = ragged(batch, heads, dim, dim_v, longest, dtype), queries(batch, heads * group, n, dim, dtype)
        for options in (dict(causal=True), dict(causal=False, softcap=2.0, sinks=sinks_of(heads * group))):
            assert error_of(q, kv, lkv_ext.attend(q, kv, **options), **options) <= tolerance
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_instruction_sets(isa: str) -> None:
    result = run(isa, ON_ISA, isa)
    if f"LKV_CPU_ISA={isa} is not available here" in result.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert result.returncode == 0, result.stderr


def one_segment(logits: Tensor) -> lkv_ext.RaggedKV:
    """Rows that have these logits for a query of 1."""
    v = torch.randn(len(logits), 4, generator=generator(1))
    lengths = torch.tensor([[len(logits)]], dtype=torch.int32)
    ends = torch.tensor([0, len(logits)], dtype=torch.int32)
    return lkv_ext.RaggedKV(logits[:, None].clone(), v, (), lengths, lengths, ends, len(logits))


def test_far_logits_do_not_overflow() -> None:
    """Running softmax over pieces whose logits lie far apart, ascending and descending, and -inf among them."""
    kv = one_segment(
        torch.cat([torch.linspace(-400, 400, 3000), torch.full((200,), -torch.inf), torch.linspace(300, -900, 3000)])
    )
    q = torch.ones(1, 1, 1, 1)
    assert error_of(q, kv, lkv_ext.attend(q, kv, scale=1.0), scale=1.0) <= 2e-5


@pytest.mark.parametrize("sink", [-torch.inf, -500.0, -1.0, 0.0, 80.0, 500.0, 1e30, torch.inf])
@pytest.mark.parametrize("count", [1, 70, 5000])
def test_sinks_beside_far_logits(count: int, sink: float) -> None:
    """One row, several tiles, several pieces; the sink above all logits, among them and below."""
    kv, sinks = one_segment(torch.linspace(-400, 400, count)), torch.tensor([sink])
    got = lkv_ext.attend(torch.ones(1, 1, 1, 1), kv, scale=1.0, sinks=sinks)
    assert error_of(torch.ones(1, 1, 1, 1), kv, got, scale=1.0, sinks=sinks) <= 2e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_sinks_of_every_dtype(dtype: torch.dtype) -> None:
    kv, q = ragged(2, 3, 64, 64, 300, torch.float32), queries(2, 6, 3, 64, torch.float32)
    sinks = sinks_of(6).to(dtype)
    got = lkv_ext.attend(q, kv, sinks=sinks)
    assert error_of(q, kv, got, sinks=sinks) <= TOLERANCE[torch.float32]
    assert torch.equal(got, lkv_ext.attend(q, kv, sinks=sinks.float()))


def test_a_sink_of_minus_infinity_is_none() -> None:
    kv, q = ragged(2, 3, 64, 64, 3000, torch.bfloat16), queries(2, 6, 3, 64, torch.bfloat16)
    assert torch.equal(lkv_ext.attend(q, kv, sinks=torch.full((6,), -torch.inf)), lkv_ext.attend(q, kv))


@pytest.mark.parametrize("sink", [-torch.inf, 0.0, 1e30, torch.inf, torch.nan])
def test_sinks_without_rows(sink: float) -> None:
    """A query that sees no row gets zeros, whatever its sink."""
    cache, sinks = lkv_ext.RaggedCache.empty(1, 2, 8, reserve=0), torch.full((4,), sink)
    assert torch.equal(lkv_ext.attend(torch.ones(1, 4, 3, 8), cache, sinks=sinks), torch.zeros(1, 4, 3, 8))
    kv = one_segment(torch.zeros(2))  # the first of three queries sees none
    got = lkv_ext.attend(torch.ones(1, 1, 3, 1), kv, sinks=sinks[:1])
    assert torch.equal(got[0, 0, 0], torch.zeros(4)) and got[0, 0, 1:].isnan().all() == torch.tensor(sink).isnan()


@pytest.mark.parametrize("group, n", [(1, 1), (4, 1), (3, 70)])
def test_sinks_as_gpt_oss_has_them(group: int, n: int) -> None:
    """transformers' eager attention of gpt-oss over whole rows."""
    eager = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss").eager_attention_forward
    g, heads, length = generator(n), 2, 200
    k, v = (torch.randn(2, heads, length, 32, generator=g) for _ in range(2))
    q, sinks = queries(2, heads * group, n, 32, torch.float32), torch.randn(heads * group, generator=g) * 2
    cache = lkv_ext.RaggedCache.empty(2, heads, 32)
    cache.append(k, v)
    later = torch.arange(length) > torch.arange(n)[:, None] + length - n
    mask = torch.zeros(n, length).masked_fill(later, torch.finfo().min)
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=group, training=False)
    want, _ = eager(module, q, k, v, mask, scaling=0.2)
    got = cache.attend(q, scale=0.2, sinks=sinks)
    torch.testing.assert_close(got.transpose(1, 2), want, rtol=0, atol=1e-5)


def test_nan_stays_with_its_query() -> None:
    kv = ragged(1, 2, 16, 16, 300, torch.float32)
    q = queries(1, 4, 9, 16, torch.float32).clone()
    want = lkv_ext.attend(q, kv)
    q[0, 1, 4] = torch.nan
    got = lkv_ext.attend(q, kv)
    assert got[0, 1, 4].isnan().all()
    got[0, 1, 4] = want[0, 1, 4]
    assert torch.equal(got, want)


def test_result_does_not_depend_on_threads() -> None:
    kv, q = ragged(1, 3, 64, 64, 9000, torch.float32), queries(1, 6, 3, 64, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(lkv_ext.attend(q, kv))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty() -> None:
    for batch, heads, n in ((0, 2, 1), (1, 0, 1), (1, 2, 0)):
        cache = lkv_ext.RaggedCache.empty(batch, heads, 8)
        assert lkv_ext.attend(torch.zeros(batch, heads, n, 8), cache).shape == (batch, heads, n, 8)
    cache = lkv_ext.RaggedCache.empty(1, 2, 8, reserve=0)
    assert torch.equal(lkv_ext.attend(torch.ones(1, 2, 3, 8), cache), torch.zeros(1, 2, 3, 8))


def mixed(kv: lkv_ext.RaggedKV, k: torch.dtype, v: torch.dtype) -> lkv_ext.RaggedKV:
    return replace(kv, k=kv.k.to(k), v=kv.v.to(v))


@pytest.mark.parametrize("types", list(product(TOLERANCE, repeat=3)), ids=str)
def test_dtypes_of_q_k_and_v_may_differ(device: str, types: tuple[torch.dtype, ...]) -> None:
    dtype, *of_rows = types
    for batch, heads, group, n, dim, dim_v, longest in ((2, 3, 3, 5, 72, 64, 300), (1, 2, 4, 1, 7, 3, 65)):
        kv, sinks = mixed(ragged(batch, heads, dim, dim_v, longest, torch.float32), *of_rows), sinks_of(heads * group)
        q = queries(batch, heads * group, n, dim, dtype)
        there = SimpleNamespace(
            **{name: getattr(kv, name).to(device) for name in ("k", "v", "cu_seqlens", "lengths")}, max_length=longest
        )
        got = lkv_ext.attend(q.to(device), there, sinks=sinks.to(device))
        assert got.dtype == dtype and error_of(q, kv, got, sinks=sinks) <= TOLERANCE[dtype]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("types", list(product(TOLERANCE, repeat=3)), ids=str)
def test_autocast_gives_what_dense_attention_gives(types: tuple[torch.dtype, ...], cast: torch.dtype) -> None:
    """Its dtype, and its values as far as that dtype tells; the rows stay what they are."""
    dtype, *of_rows = types
    kv = mixed(ragged(1, 1, 64, 64, 200, torch.float32), *of_rows)
    q = queries(1, 4, 3, 64, dtype)
    mask = torch.ones(3, 200, dtype=torch.bool).tril(197)
    with torch.autocast("cpu", dtype=cast):
        k, v = (t[None, None, :200].expand(1, 4, -1, -1) for t in (kv.k, kv.v))
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        got = lkv_ext.attend(q, kv)
        assert lkv_ext.attend(q.double().to(dtype), kv).dtype == cast
    assert got.dtype == want.dtype == cast and [kv.k.dtype, kv.v.dtype] == of_rows
    assert float((got - want).abs().max()) <= TOLERANCE[torch.bfloat16]
    with torch.autocast("cpu", dtype=cast, enabled=False):
        assert lkv_ext.attend(q, kv).dtype == dtype


def test_autocast_casts_no_doubles() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="got float64"):
        lkv_ext.attend(torch.zeros(1, 1, 1, 8, dtype=torch.float64), lkv_ext.RaggedCache.empty(1, 1, 8))


def test_autocast_under_compile() -> None:
    kv, q = ragged(1, 2, 16, 16, 50, torch.float32), queries(1, 4, 1, 16, torch.float32)
    attend = torch.compile(lambda q: lkv_ext.attend(q, kv), fullgraph=True, backend="aot_eager")
    assert torch.equal(attend(q), lkv_ext.attend(q, kv))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(q), lkv_ext.attend(q, kv)) and attend(q).dtype == torch.bfloat16


def wrong(**changes: object) -> dict[str, object]:
    kv = ragged(2, 2, 8, 8, 20, torch.float32)
    return dict(q=torch.zeros(2, 4, 1, 8), k=kv.k, v=kv.v, cu_seqlens=kv.cu_seqlens, lengths=kv.lengths) | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=torch.zeros(2, 4, 8)), r"expected q of shape \[B, Hq, n, D\], got \[2, 4, 8\]"),
        (dict(q=3), r"expected q of shape \[B, Hq, n, D\], got int"),
        (dict(q=torch.zeros(2, 3, 1, 8)), r"Hq a multiple of H = 2, got \[2, 3, 1, 8\]"),
        (dict(q=torch.zeros(1, 4, 1, 8)), "with B = 2"),
        (dict(q=torch.zeros(2, 4, 1, 9)), "expected q with rows of D = 8"),
        (dict(q=torch.zeros(2, 4, 1, 7)), "expected q with rows of D = 8"),
        (dict(k=torch.zeros(9, 8).double()), "expected k of dtype float32, float16 or bfloat16, got float64"),
        (dict(v=torch.zeros(9, 8).int()), "expected v of dtype float32, float16 or bfloat16, got int32"),
        (dict(q=torch.zeros(2, 4, 1, 8).int()), "expected q of dtype float32, float16 or bfloat16, got int32"),
        (dict(q=torch.zeros(2, 4, 1, 16)[..., ::2]), "expected q contiguous after the token axis"),
        (dict(q=torch.zeros(2, 4, 1, 8, requires_grad=True)), "require no gradient"),
        (dict(v=None), "expected a cache with v"),
        (dict(v=torch.zeros(3, 8)), r"expected v of shape \[T, Dv\]"),
        (dict(k=torch.zeros(9, 8, device="meta")), "expected k on cpu, got meta"),
        (dict(lengths=torch.zeros(2, 2)), "expected lengths of dtype int32"),
        (dict(sinks=torch.zeros(2)), r"expected sinks of shape \[Hq\] = \[4\], got \[2\]"),
        (dict(sinks=torch.zeros(1, 4)), r"expected sinks of shape \[Hq\] = \[4\], got \[1, 4\]"),
        (dict(sinks=torch.zeros(4, dtype=torch.int32)), "expected sinks of dtype float32, float16 or bfloat16"),
        (dict(sinks=torch.zeros(4, dtype=torch.float64)), "expected sinks of dtype float32, float16 or bfloat16"),
        (dict(sinks=torch.zeros(4, device="meta")), "expected sinks on cpu"),
        (dict(sinks=torch.zeros(8)[::2]), "expected sinks contiguous"),
        (dict(sinks=[0.0] * 4), r"expected sinks in a tensor of shape \[Hq\], got list"),
        (dict(sinks=torch.zeros(4, requires_grad=True)), "require no gradient"),
        (dict(lengths=torch.zeros(4, dtype=torch.int32)), r"expected lengths of shape \[B, H\]"),
        (dict(cu_seqlens=torch.zeros(4, dtype=torch.int32)), r"expected cu_seqlens of shape \[B \* H \+ 1\]"),
    ],
)
def test_errors(changes: dict[str, object], message: str) -> None:
    arguments = wrong(**changes)
    q, sinks = arguments.pop("q"), arguments.pop("sinks", None)
    with pytest.raises((ValueError, TypeError), match=f"lkv_ext.attend: .*{message}"):
        lkv_ext.attend(q, SimpleNamespace(**arguments, max_length=20), sinks=sinks)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(softcap=0), "softcap above 0"),
        (dict(causal=1), "expected causal as a bool, got 1"),
        (dict(causal=None), "expected causal as a bool, got None"),
        (dict(backend="cudnn"), "expected backend 'lkv'"),
        (dict(backend="torch"), "expected float16 or bfloat16"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        lkv_ext.attend(torch.zeros(1, 1, 1, 8), lkv_ext.RaggedCache.empty(1, 1, 8), **options)


@pytest.mark.parametrize("most", [0, 7, 1000, 2**62])
def test_lengths_are_cut(most: int) -> None:
    """At the span of the head, at max_length and at zero: rows of other heads are never read."""
    kv, q = ragged(1, 3, 8, 8, 20, torch.float32), torch.ones(1, 3, 1, 8)
    k, v = (torch.randn(t.shape, generator=generator(2)) for t in (kv.k, kv.v))
    spans = kv.cu_seqlens.diff()[None]
    assert spans[0, 0] > 7
    given = replace(kv, k=k, v=v, lengths=torch.tensor([[1000, -5, 2**31 - 1]], dtype=torch.int32), max_length=most)
    lengths = torch.minimum(spans, torch.tensor([[most, 0, most]]).clamp(max=1000)).int()
    want = lkv_ext.attend(q, replace(given, lengths=lengths, max_length=int(spans.max())))
    assert torch.equal(lkv_ext.attend(q, given), want)


@pytest.mark.parametrize("most", [2**31, 2**62, 2**63 - 1])
def test_a_max_length_beyond_the_rows_changes_nothing(most: int) -> None:
    """Not the order of the sums either, though a long head is cut into pieces by it."""
    kv, q = one_segment(torch.randn(5000, generator=generator(4))), torch.ones(1, 1, 3, 1)
    assert torch.equal(lkv_ext.attend(q, replace(kv, max_length=most)), lkv_ext.attend(q, kv))
