"""Tensors to test on, and how results are compared with the reference: bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

import lkv_ext
from lkv import reference
from lkv.reference.evict import Evicted

SCORES = (
    "normal",
    "ties",
    "constant",
    "minus_infinity",
    "infinities",
    "nan",
    "nan_and_infinity",
    "signed_zeros",
    "tiny",
    "ascending",
    "descending",
    "one_bin",
)
SCORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.bool,
    torch.complex64,
)
PLACEMENTS = ("contiguous", "tokens_first", "tokens_last_axis_but_one", "gapped", "wide")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores_of(kind: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """float32 `shape`, of the hostile kind `kind`."""
    g, shape = generator(seed), list(shape)
    noise = torch.randn(shape, generator=g)

    def among(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=g)]

    nan, inf = float("nan"), float("inf")
    if kind == "ties":
        return torch.randint(8, shape, generator=g) / 8
    if kind == "tiny":
        return noise.exp() / max(shape[-1], 1)
    if kind in ("ascending", "descending"):
        return noise.sort(descending=kind == "descending").values
    if kind == "one_bin":
        return 1 + torch.randint(40, shape, generator=g) * 2.0**-20
    constant = {"constant": -0.25, "minus_infinity": -inf, "nan": nan}
    if kind in constant:
        return torch.full(shape, constant[kind])
    if kind == "infinities":
        return torch.where(among(0, 1) > 0, noise, among(inf, -inf))
    if kind == "nan_and_infinity":
        return among(nan, -inf, inf, 0.0, -1e-30)
    if kind == "signed_zeros":
        return among(0.0, -0.0, 1e-40, -1e-40)
    assert kind == "normal"
    return noise


def rows_of(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits: rows move as bytes, NaN payloads and all."""
    if dtype is torch.bool:
        return torch.randint(2, list(shape), generator=generator(seed)).bool()
    raw = torch.randint(0, 256, [*shape, dtype.itemsize], dtype=torch.uint8, generator=generator(seed))
    return raw.view(dtype).view(list(shape))


def place(t: Tensor, how: str) -> Tensor:
    """The same `[B, H, L, ...]` with other strides; rows stay contiguous."""
    if how == "tokens_first":  # [B, L, H, ...]
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "tokens_last_axis_but_one":  # [L, B, H, ...]
        return t.movedim(2, 0).contiguous().movedim(0, 2)
    if how == "gapped":  # every row begins at an odd element of a longer one
        larger = t.new_zeros(*t.shape, 1) if t.dim() == 3 else t.new_zeros(*t.shape[:-1], t.shape[-1] + 2)
        view = larger[..., 0] if t.dim() == 3 else larger[..., 1:-1]
        return view.copy_(t)
    if how == "wide":  # a preallocated cache that is not full
        larger = t.new_zeros(t.shape[0], t.shape[1], t.shape[2] + 3, *t.shape[3:])
        return larger[:, :, 2 : 2 + t.shape[2]].copy_(t)
    assert how == "contiguous"
    return t.contiguous()


def bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def interleave(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v of one dtype as the halves K | V of one storage."""
    both = torch.cat([bits(k), bits(v)], -1).view(k.dtype)
    return both[..., : k.shape[-1]], both[..., k.shape[-1] :]


def twins(tensors: Sequence[Tensor], device: str | None = None) -> list[Tensor]:
    """Copies with the same strides, in copies of the same storages: what shared one shares one again."""
    memory = {t.untyped_storage().data_ptr(): storage_bytes(t) for t in tensors}
    copies = {key: m.to(device or m.device, copy=True).untyped_storage() for key, m in memory.items()}
    return [
        torch.empty(0, dtype=t.dtype, device=device or t.device).set_(
            copies[t.untyped_storage().data_ptr()], t.storage_offset(), t.shape, t.stride()
        )
        for t in tensors
    ]


def storage_bytes(t: Tensor) -> Tensor:
    """All of the memory behind a view, gaps too."""
    storage = t.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage, 0, (storage.nbytes(),), (1,))


@contextlib.contextmanager
def unreadable() -> Iterator[None]:
    """The CPU tensors of a call count as device tensors, whose values the host must not read: as under a tracer."""
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        yield


def spread(values: object, shape: Sequence[int], *, per_sequence: bool = False) -> Tensor | None:
    """Public integers (int, `[H]`, `[B]`, `[B, H]`, `[N, H]`) as a CPU tensor of one per segment."""
    if values is None:
        return None
    t = torch.as_tensor(values).cpu().long()
    if per_sequence and t.dim() == 1:
        t = t[:, None]
    if len(shape) == 3 and t.dim() == 2 and not per_sequence:
        t = t[:, None]
    return t.expand(list(shape))


def expected(
    payload: Sequence[Tensor],
    scores: Tensor,
    budgets: object,
    *,
    lengths: object = None,
    starts: object = None,
    shape: Sequence[int] | None = None,
    in_place: bool = False,
    **options: object,
) -> Evicted:
    """The reference for the public arguments of evict; `shape` is [B, H] of ragged input. Rows come as their bits."""
    shape = scores.shape[:2] if shape is None else shape
    op = reference.evict_ if in_place else reference.evict
    return op(
        [bits(t) for t in payload],
        scores,
        spread(budgets, shape),
        lengths=spread(lengths, shape, per_sequence=True),
        starts=spread(starts, shape, per_sequence=True),
        **options,
    )


def payload_of(out: lkv_ext.RaggedKV) -> list[Tensor]:
    return [out.k, *([] if out.v is None else [out.v]), *out.companions]


def check_index(got: lkv_ext.RaggedIndex | lkv_ext.RaggedKV, want: Evicted) -> None:
    assert got.positions.dtype == got.lengths.dtype == got.cu_seqlens.dtype == torch.int32
    assert got.cu_seqlens.tolist() == want.cu_seqlens.tolist()
    assert got.lengths.tolist() == want.lengths.tolist()
    assert torch.equal(got.positions, want.positions)
    assert max(got.lengths.flatten().tolist(), default=0) <= got.max_length <= got.positions.shape[-1]
    if got.overflow is not None:
        assert got.overflow.dtype == torch.int32 and got.overflow.shape == ()
        assert int(got.overflow) == want.overflow


def check_rows(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.is_contiguous()
        assert torch.equal(bits(mine), theirs)


def check(got: lkv_ext.RaggedKV, want: Evicted) -> None:
    check_index(got, want)
    check_rows(payload_of(got), want.tensors)
