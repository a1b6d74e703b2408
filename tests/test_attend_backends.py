"""Other libraries behind attend: stand-ins of the same signatures check what they get, and run the reference."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from test_attend import TOLERANCE, error_of, queries, ragged, sinks_of
from torch import Tensor

import lkv_ext
from lkv import reference
from lkv_ext._torch import attend as attend_module
from lkv_ext._torch.attend_backends import BACKENDS

BF16 = torch.bfloat16


def sequences(q: Tensor, k: Tensor, v: Tensor, n: int, cu_k: Tensor, lengths: Tensor, **options) -> Tensor:
    """`[R * n, group, D]` of R sequences of one KV head."""
    rows = q.unflatten(0, (-1, n)).transpose(1, 2)
    options["softcap"] = options.get("softcap") or None
    out = reference.attend(rows, k, v, cu_k, lengths[:, None], **options)
    return out.transpose(1, 2).flatten(0, 1).to(q.dtype)


def logsumexp(q: Tensor, k: Tensor, n: int, cu_k: Tensor, lengths: Tensor, *, causal, scale, softcap=None) -> Tensor:
    """float32 `[group, R * n]` of the logits that `sequences` has; infinite where there are none."""
    lse = torch.full(q.shape[:2], torch.inf)
    for i in range(len(q)):
        r, seen = i // n, int(lengths[i // n]) - (n - 1 - i % n if causal else 0)
        if seen > 0:
            logits = q[i].double() @ k[cu_k[r] : cu_k[r] + seen].double().T * scale
            lse[i] = (softcap * torch.tanh(logits / softcap) if softcap else logits).logsumexp(1)
    return lse.T


def flash_attn_3(q, k, v, cu_q, cu_k, max_q, max_k, *, seqused_k, softmax_scale, causal, return_attn_probs=False):
    assert cu_q.tolist() == list(range(0, len(q) + 1, max_q)) and max_k >= int(seqused_k.max())
    sizes, options = (max_q, cu_k, seqused_k), dict(causal=causal, scale=softmax_scale)
    out = sequences(q, k[:, 0], v[:, 0], *sizes, **options)
    return (out, logsumexp(q, k[:, 0], *sizes, **options)) if return_attn_probs else out


def older_flash_attn_3(q, k, v, cu_q, cu_k, max_q, max_k, *, seqused_k, softmax_scale, causal):
    """Versions that always return both."""
    options = dict(seqused_k=seqused_k, softmax_scale=softmax_scale, causal=causal)
    return flash_attn_3(q, k, v, cu_q, cu_k, max_q, max_k, **options, return_attn_probs=True)


def flash_attn_varlen(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    return_attn_probs=False,
    block_table=None,
):
    assert cu_q.tolist() == list(range(0, len(q) + 1, max_q)) and block_table is None and dropout_p == 0
    sizes, options = (max_q, cu_k, cu_k.diff()), dict(causal=causal, scale=softmax_scale, softcap=softcap)
    out = sequences(q, k[:, 0], v[:, 0], *sizes, **options)
    return (out, logsumexp(q, k[:, 0], *sizes, **options), None) if return_attn_probs else out


class AuxRequest(NamedTuple):
    lse: bool = False


def varlen_attn(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa, seqused_k
):
    assert enable_gqa and window_size in ((-1, 0), (-1, -1))
    sizes, options = (max_q, cu_k, seqused_k), dict(causal=window_size == (-1, 0), scale=scale)
    out = sequences(q, k[:, 0], v[:, 0], *sizes, **options)
    return (out, logsumexp(q, k[:, 0], *sizes, **options)) if return_aux is not None and return_aux.lse else out


def unpaged(pool: Tensor, pages: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The rows of the pages of each sequence one behind the other, and where they begin."""
    assert pool.shape[2] == 1
    parts = [pool[p, :, 0].flatten(0, 1) for p in pages]
    ends = torch.tensor([0, *map(len, parts)]).cumsum(0).int()
    return torch.cat(parts), ends


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    *,
    cache_seqlens,
    block_table,
    softmax_scale,
    causal,
    softcap=0.0,
    return_softmax_lse=False,
):
    batch, n, _, _ = q.shape
    assert k_cache.shape[1] % 256 == 0 and block_table.dtype == cache_seqlens.dtype == torch.int32
    assert block_table.shape[0] == len(cache_seqlens) == batch
    assert int(block_table.max()) < len(k_cache) and block_table.shape[1] * k_cache.shape[1] >= int(cache_seqlens.max())
    (k, cu), (v, _) = (unpaged(pool, block_table.tolist()) for pool in (k_cache, v_cache))
    options = dict(causal=causal, scale=softmax_scale, softcap=softcap)
    out = sequences(q.flatten(0, 1), k, v, n, cu, cache_seqlens, **options).unflatten(0, (batch, n))
    if not return_softmax_lse:
        return out
    lse = logsumexp(q.flatten(0, 1), k, n, cu, cache_seqlens, **options)
    return out, lse.unflatten(1, (batch, n)).transpose(0, 1)


class BatchPrefillWithPagedKVCacheWrapper:
    made = 0

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False):
        type(self).made += 1
        assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        *,
        causal=False,
        sm_scale=None,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
    ):
        given = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(t.dtype == torch.int32 for t in given) and num_kv_heads == 1 and q_data_type == kv_data_type
        assert len(paged_kv_indices) == int(paged_kv_indptr[-1])
        self.n = int(qo_indptr[1])
        pages = paged_kv_indptr.diff()
        assert ((paged_kv_last_page_len >= 1) | (pages == 0)).all() and (paged_kv_last_page_len <= page_size).all()
        self.lengths = (pages - 1).clamp(min=0) * page_size + paged_kv_last_page_len
        self.pages = [p.tolist() for p in paged_kv_indices.split(pages.tolist())]
        self.options = dict(causal=causal, scale=sm_scale, softcap=logits_soft_cap)
        self.form = (num_qo_heads, head_dim_qk, page_size)

    def run(self, q, paged_kv_cache):
        k, v = paged_kv_cache
        assert (q.shape[1], q.shape[2], k.shape[1]) == self.form
        (k, cu), (v, _) = (unpaged(pool, self.pages) for pool in (k, v))
        return sequences(q, k, v, self.n, cu, self.lengths, **self.options)


MODULES = {
    "flash_attn": ("flash_attn_interface", SimpleNamespace(flash_attn_varlen_func=flash_attn_3)),
    "torch": ("torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn, AuxRequest=AuxRequest)),
    "flash_attn_2": (
        "flash_attn",
        SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen, flash_attn_with_kvcache=flash_attn_with_kvcache),
    ),
    "flashinfer": (
        "flashinfer",
        SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper),
    ),
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Makes the stand-ins of these backends what is installed."""

    def forget() -> None:
        for backend in BACKENDS.values():
            backend.load.cache_clear()

    def install(*names: str) -> None:
        for backend, (name, module) in MODULES.items():
            if backend in names or backend != "torch":
                monkeypatch.setitem(sys.modules, name, module if backend in names else None)
        forget()

    yield install
    forget()


def in_pages(align: int, dim: int, longest: int = 300) -> lkv_ext.RaggedCache:
    """A cache of pages through evictions and appends: heads of very different lengths, slack and holes between."""
    g = torch.Generator().manual_seed(dim)
    k, v = (torch.randn(2, 3, longest, dim, generator=g).to(BF16) for _ in range(2))
    scores = torch.rand(2, 3, longest, generator=g)
    kv = lkv_ext.evict(k, v, scores, [[0, 7, longest], [1, 256, 40]], align=align, reserve=2)
    cache = lkv_ext.RaggedCache(kv, longest)
    for n in (1, 2, 270):  # within the slack, at its end, and far beyond
        cache.append(k[:, :, :n], v[:, :, :n], valid=[n, n // 2])
    cache.evict(cache.packed(torch.rand(2, 3, cache.max_length, generator=g)), [3, 290, 20], reserve=1)
    cache.append(k[:, :, :4], v[:, :, :4])
    return cache


def check(q: Tensor, cache: lkv_ext.RaggedCache | lkv_ext.RaggedKV, backend: str, *more: dict[str, object]) -> None:
    for options in (dict(causal=True), dict(causal=False, scale=0.3), *more):
        got = lkv_ext.attend(q, cache, backend=backend, **options)
        assert got.shape == (*q.shape[:3], cache.v.shape[-1]) and got.transpose(1, 2).is_contiguous()
        assert error_of(q, cache, got, **options) <= TOLERANCE[BF16]


@pytest.mark.parametrize("n", [1, 4])
def test_flash_attention_3(installed, n: int) -> None:
    installed("flash_attn")
    check(queries(2, 6, n, 16, BF16), ragged(2, 3, 16, 16, 40, BF16), "flash_attn")


@pytest.mark.parametrize("n", [1, 4])
def test_flash_attention_2_without_slack(installed, n: int) -> None:
    installed("flash_attn_2")
    k, v = (torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(i)).to(BF16) for i in range(2))
    kv = lkv_ext.evict(k, v, torch.rand(2, 3, 50), [9, 0, 31])
    check(queries(2, 6, n, 16, BF16), kv, "flash_attn_2", dict(softcap=2.0))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("align", [256, 512])
def test_flash_attention_2_in_pages(installed, align: int, n: int) -> None:
    installed("flash_attn_2")
    cache = in_pages(align, 16)
    check(queries(2, 6, n, 16, BF16), cache, "flash_attn_2", dict(softcap=2.0))
    assert cache.block_table is cache.block_table  # made once for a number of pages


def test_flash_attention_2_in_pages_of_an_eviction(installed) -> None:
    installed("flash_attn_2")
    k, v = (torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(i)).to(BF16) for i in range(2))
    kv = lkv_ext.evict(k, v, torch.rand(2, 3, 50), [9, 0, 31], reserve=5, align=256)
    check(queries(2, 6, 3, 16, BF16), kv, "flash_attn_2")


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("align", [1, 16])
def test_flashinfer(installed, align: int, n: int) -> None:
    installed("flashinfer")
    before = BatchPrefillWithPagedKVCacheWrapper.made
    check(queries(2, 6, n, 64, BF16), in_pages(align, 64), "flashinfer", dict(softcap=2.0))
    assert BatchPrefillWithPagedKVCacheWrapper.made == before + 1


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("backend", ["flash_attn", "flash_attn_2", "torch"])
def test_sinks(installed, backend: str, n: int) -> None:
    """What a library computed without them is corrected; of a query without rows, zeros stay zeros."""
    installed(backend)
    q, sinks = queries(2, 6, n, 16, BF16), sinks_of(6).to(BF16)
    options = [dict(causal=causal, sinks=sinks.to(dtype)) for causal in (True, False) for dtype in TOLERANCE]
    if backend == "flash_attn_2":
        check(q, in_pages(256, 16), backend, *options, dict(sinks=sinks, softcap=2.0))
        k = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(n)).to(BF16)
        check(q, lkv_ext.evict(k, k, k[..., 0].float(), [40, 0, 3]), backend, *options)
    else:
        check(q, ragged(2, 3, 16, 16, 40, BF16), backend, *options)


def test_sinks_in_an_older_flash_attention_3(installed, monkeypatch) -> None:
    installed("flash_attn")
    module = SimpleNamespace(flash_attn_varlen_func=older_flash_attn_3)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    check(queries(2, 6, 3, 16, BF16), ragged(2, 3, 16, 16, 40, BF16), "flash_attn", dict(sinks=sinks_of(6)))


def test_no_result_without_the_denominators_that_sinks_need(installed, monkeypatch) -> None:
    installed("flash_attn")
    for wrong in (flash_attn_3, lambda *sizes, **options: (flash_attn_3(*sizes, **options), torch.zeros(5))):
        without = lambda *sizes, seqused_k, softmax_scale, causal, wrong=wrong: wrong(  # noqa: E731
            *sizes, seqused_k=seqused_k, softmax_scale=softmax_scale, causal=causal
        )
        monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_varlen_func=without))
        BACKENDS["flash_attn"].load.cache_clear()
        with pytest.raises(RuntimeError, match="lkv_ext.attend: expected logsumexp of shape"):
            lkv_ext.attend(
                queries(2, 6, 1, 16, BF16), ragged(2, 3, 16, 16, 40, BF16), backend="flash_attn", sinks=sinks_of(6)
            )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("n", [1, 4])
def test_torch_on_a_gpu(n: int) -> None:
    if BACKENDS["torch"].load() is None:
        pytest.skip("torch.nn.attention.varlen takes used lengths from torch 2.13 on")
    kv, q, sinks = ragged(2, 3, 64, 64, 300, BF16), queries(2, 6, n, 64, BF16), sinks_of(6)
    there = SimpleNamespace(
        **{name: getattr(kv, name).cuda() for name in ("k", "v", "cu_seqlens", "lengths")}, max_length=300
    )
    for options in (dict(), dict(causal=False), dict(sinks=sinks)):
        moved = {name: value.cuda() if name == "sinks" else value for name, value in options.items()}
        got = lkv_ext.attend(q.cuda(), there, backend="torch", **moved)
        assert error_of(q, kv, got, **options) <= TOLERANCE[BF16]


def chosen(cache: object, dtype: torch.dtype = BF16, dim: int = 16, softcap: float | None = None) -> str | None:
    """The backend of a call on CUDA that names none."""
    call = attend_module._call(torch.zeros(2, 6, 1, dim, dtype=dtype), cache, True, 1.0, softcap)
    read = attend_module._reader(call, None)
    return next((name for name, backend in BACKENDS.items() if read is not None and backend.load() is read), None)


def test_the_first_that_is_installed_and_fits(installed) -> None:
    loose, paged = in_pages(1, 16), in_pages(256, 16)
    installed("flash_attn", "flash_attn_2", "flashinfer")
    assert chosen(loose) == chosen(paged) == "flash_attn"
    assert chosen(paged, softcap=2.0) == "flash_attn_2" and chosen(loose, softcap=2.0) is None
    assert chosen(in_pages(1, 16), dtype=torch.float32) is None
    installed("flash_attn_2", "flashinfer")
    assert chosen(paged) == "flash_attn_2"
    assert chosen(loose) == ("torch" if BACKENDS["torch"].load() else None)
    installed("flashinfer")
    assert chosen(in_pages(16, 64), dim=64) == ("torch" if BACKENDS["torch"].load() else None)


@pytest.mark.parametrize(
    "backend, dim, options, message",
    [
        ("flash_attn_2", 16, dict(), "expected rows without reserve, or an align that is a multiple of 256, for"),
        ("flash_attn", 16, dict(softcap=1.0), "expected float16 or bfloat16, Dv = D <= 256 and no softcap for"),
        (
            "flashinfer",
            16,
            dict(),
            "expected float16 or bfloat16, Dv = D of 64, 128, 256 and no sinks for backend 'fla",
        ),
        ("flashinfer", 64, dict(sinks=torch.zeros(6)), "expected float16 .*, align 1, sinks"),
        ("flash_attn", 16, dict(sinks=torch.zeros(5)), r"expected sinks of shape \[Hq\] = \[6\], got \[5\]"),
        ("flash_attn", 16, dict(), "expected a backend that is installed, got 'flash_attn'"),
        ("cudnn", 16, dict(), "expected backend 'lkv' or one of 'flash_attn', 'flash_attn_2', 'torch', 'flashinfer'"),
    ],
)
def test_what_does_not_fit(installed, backend: str, dim: int, options: dict[str, object], message: str) -> None:
    installed()
    with pytest.raises(ValueError, match=f"lkv_ext.attend: {message}"):
        lkv_ext.attend(queries(2, 6, 1, dim, BF16), in_pages(1, dim), backend=backend, **options)


def test_queries_of_other_heads(installed) -> None:
    installed("flash_attn")
    with pytest.raises(ValueError, match=r"with B = 2 and Hq a multiple of H = 3, got \[2, 5, 1, 16\]"):
        lkv_ext.attend(queries(2, 5, 1, 16, BF16), in_pages(1, 16), backend="flash_attn")
