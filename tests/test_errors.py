"""Every argument wrong in each way: an error that names it, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cases import rows_of, scores_of, storage_bytes, unreadable

import lkv_ext

B, H, L, D = 2, 3, 10, 8


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return rows_of(shape, torch.int8).to(dtype).to(device) if device == "cpu" else torch.empty(shape, device=device)


def dense() -> dict:
    return dict(
        k=tensor(B, H, L, D),
        v=tensor(B, H, L, D - 3),
        scores=scores_of("normal", [B, H, L]),
        budgets=4,
        companions=[tensor(B, H, L)],
    )


def ragged() -> dict:
    return dict(
        k=tensor(30, D),
        v=tensor(30, D),
        scores=scores_of("normal", [30]),
        budgets=[[1, 2, 3], [4, 5, 6]],
        cu_seqlens=torch.tensor([0, 5, 10, 15, 20, 25, 30], dtype=torch.int32),
    )


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def columns(*shape: int) -> torch.Tensor:
    """The last dimension is strided."""
    return tensor(*shape, 2)[..., 0]


PER_HEAD = "of shape [H] = [3] or [B, H] = [2, 3], got"
PER_SEQUENCE = "of shape [B] = [2] or [B, H] = [2, 3], got"
LIKE_K = "of shape [B, H, L, ...] with [2, 3, 10], got"
RANKED = "expected scores of shape [B, H, L] = [2, 3, 10], got"
SCORE_TYPES = "expected scores of dtype float32, float16 or bfloat16"
AT_LEAST = "expected sink, window and reserve >= 0 and align >= 1, got"
STRIDED = "contiguous after the token axis, got strides"
# argument(s), what stands in their place, the error, its message
BAD_TENSORS = (
    (dict(k=None), TypeError, "expected k and v as tensors, got NoneType and Tensor"),
    (dict(v=[[1.0]]), TypeError, "expected k and v as tensors, got Tensor and list"),
    (dict(k=tensor(H, L, D)), ValueError, "expected k of shape [B, H, L, D], got [3, 10, 8]"),
    (dict(k=tensor(1, B, H, L, D)), ValueError, "expected k of shape [B, H, L, D], got [1, 2, 3, 10, 8]"),
    (dict(k=columns(B, H, L, D)), ValueError, f"expected k {STRIDED}"),
    (dict(k=tensor(B, H, L, 1).expand(B, H, L, D)), ValueError, f"expected k {STRIDED}"),
    (dict(k=tensor(B, H, L, D, device="meta")), ValueError, "expected "),
    (dict(v=tensor(B, H, L)), ValueError, "expected v of shape [B, H, L, D], got [2, 3, 10]"),
    (dict(v=tensor(B, H, L + 1, D)), ValueError, f"expected v {LIKE_K} [2, 3, 11, 8]"),
    (dict(v=tensor(B, H + 1, L, D)), ValueError, f"expected v {LIKE_K} [2, 4, 10, 8]"),
    (dict(v=tensor(B + 1, H, L, D)), ValueError, f"expected v {LIKE_K} [3, 3, 10, 8]"),
    (dict(v=columns(B, H, L, D)), ValueError, f"expected v {STRIDED}"),
    (dict(v=tensor(B, H, L, D, device="meta")), ValueError, "expected v on cpu, got "),
    (dict(scores=tensor(B, L)), ValueError, f"{RANKED} [2, 10]"),
    (dict(scores=tensor(B, H, L, 1)), ValueError, f"{RANKED} [2, 3, 10, 1]"),
    (dict(scores=tensor(B, 4 * H, L)), ValueError, f"{RANKED} [2, 12, 10]"),
    (dict(scores=tensor(B, H, L - 1)), ValueError, f"{RANKED} [2, 3, 9]"),
    (dict(scores=tensor(B, H, L, dtype=torch.float64)), TypeError, SCORE_TYPES),
    (dict(scores=tensor(B, H, L, dtype=torch.int32)), TypeError, SCORE_TYPES),
    (dict(scores=tensor(B, H, L, device="meta")), ValueError, "expected scores on cpu, got "),
    (dict(companions=[tensor(B, H)]), ValueError, f"expected companions[0] {LIKE_K} [2, 3]"),
    (
        dict(companions=[tensor(B, H, L), tensor(B, H, L - 1, 2)]),
        ValueError,
        f"expected companions[1] {LIKE_K} [2, 3, 9, 2]",
    ),
    (dict(companions=[columns(B, H, L, 4)]), ValueError, f"expected companions[0] {STRIDED}"),
    (dict(companions=[tensor(B, H, L, 4, 2).transpose(3, 4)]), ValueError, f"expected companions[0] {STRIDED}"),
    (dict(companions=[tensor(B, H, L, device="meta")]), ValueError, "expected companions[0] on cpu, got "),
)  # fmt: skip
BAD_INTEGERS = (
    (dict(budgets=[1, 2]), ValueError, f"expected budgets {PER_HEAD} [2]"),
    (dict(budgets=[[1, 2, 3]] * 3), ValueError, f"expected budgets {PER_HEAD} [3, 3]"),
    (dict(budgets=[[1, 2, 3], [1, 2]]), ValueError, "expected budgets with rows of one length, got lengths [3, 2]"),
    (dict(budgets=[]), ValueError, f"expected budgets {PER_HEAD} [0]"),
    (dict(budgets=ints(4)), ValueError, f"expected budgets {PER_HEAD} [4]"),
    (dict(budgets=ints(2, 1)), ValueError, f"expected budgets {PER_HEAD} [2, 1]"),
    (dict(budgets=torch.ones(3)), TypeError, "expected budgets of integers, got torch.float32"),
    (dict(budgets=torch.ones(3, dtype=torch.bool)), TypeError, "expected budgets of integers, got torch.bool"),
    (dict(budgets=[1.0, 2.0, 3.0]), TypeError, "expected budgets of integers, got [1.0, 2.0, 3.0]"),
    (dict(budgets=0.15), TypeError, "expected budgets as an int, a sequence of ints or a tensor, got 0.15"),
    (dict(budgets="all"), TypeError, "expected budgets as an int, a sequence of ints or a tensor, got 'all'"),
    (dict(budgets=None), (TypeError, ValueError), "expected budgets "),
    (dict(budgets=ints(3).to("meta"), max_budget=3), ValueError, "expected budgets on cpu, got "),
    (dict(lengths=[1, 2, 3]), ValueError, f"expected lengths {PER_SEQUENCE} [3]"),
    (dict(lengths=torch.zeros(2, 2, dtype=torch.int64)), ValueError, f"expected lengths {PER_SEQUENCE} [2, 2]"),
    (dict(lengths=torch.ones(2)), TypeError, "expected lengths of integers, got torch.float32"),
    (dict(lengths=[0.5, 1]), TypeError, "expected lengths of integers, got [0.5, 1]"),
    (dict(lengths=ints(2).to("meta")), ValueError, "expected lengths on cpu, got "),
    (dict(starts=[1, 2, 3]), ValueError, f"expected starts {PER_SEQUENCE} [3]"),
    (dict(starts=torch.ones(2)), TypeError, "expected starts of integers, got torch.float32"),
    (dict(starts=ints(2).to("meta")), ValueError, "expected starts on cpu, got "),
    (dict(sink=-1), ValueError, f"{AT_LEAST} -1, 0, 0 and 1"),
    (dict(window=-2), ValueError, f"{AT_LEAST} 0, -2, 0 and 1"),
    (dict(sink=0.5), TypeError, "expected sink"),
    (dict(window="8"), TypeError, "expected window"),
    (dict(max_budget=-1), ValueError, "expected max_budget >= 0, got -1"),
    (dict(max_budget=1.5), TypeError, "expected max_budget"),
)  # fmt: skip
BAD_SPANS = (
    (dict(layout="dense"), ValueError, "expected layout 'packed' or 'padded', got 'dense'"),
    (dict(capacity=-4), ValueError, "expected capacity >= 0 and a multiple of align = 1, got -4"),
    (dict(capacity=10, align=4), ValueError, "expected capacity >= 0 and a multiple of align = 4, got 10"),
    (dict(capacity=2.0), TypeError, "expected capacity"),
    (dict(reserve=-1), ValueError, f"{AT_LEAST} 0, 0, -1 and 1"),
    (dict(reserve=1.5), TypeError, "expected reserve"),
    (dict(align=0), ValueError, f"{AT_LEAST} 0, 0, 0 and 0"),
    (dict(align=2.5), TypeError, "expected align"),
    (dict(reserve=2**31, budgets=1), ValueError, "expected at most 2**31 - 1 rows in the output, got"),
)
BAD_RAGGED = (
    (dict(k=tensor(30, 2, D)), ValueError, "expected k of shape [T, D], got [30, 2, 8]"),
    (dict(v=tensor(29, D)), ValueError, "expected v of shape [T, ...] with [30], got [29, 8]"),
    (dict(v=columns(30, D)), ValueError, f"expected v {STRIDED}"),
    (dict(scores=tensor(31)), ValueError, "expected scores of shape [T] = [30], got [31]"),
    (dict(scores=tensor(1, 30)), ValueError, "expected scores of shape [T] = [30], got [1, 30]"),
    (dict(companions=[tensor(20)]), ValueError, "expected companions[0] of shape [T, ...] with [30], got [20]"),
    (dict(cu_seqlens=ints(6)), ValueError, "expected cu_seqlens of shape [B * H + 1] = [7], got [6]"),
    (dict(cu_seqlens=ints(7, 1)), ValueError, "expected cu_seqlens of shape [B * H + 1], got [7, 1]"),
    (dict(cu_seqlens=torch.zeros(7, dtype=torch.int64)), TypeError, "expected cu_seqlens of dtype int32"),
    (dict(cu_seqlens=torch.zeros(7)), TypeError, "expected cu_seqlens of dtype int32"),
    (dict(cu_seqlens=ints(14)[::2]), ValueError, "expected cu_seqlens contiguous"),
    (dict(cu_seqlens=ints(7).to("meta")), ValueError, "expected cu_seqlens on cpu, got "),
    (dict(starts=[0, 0]), ValueError, "expected no starts with cu_seqlens"),
    (dict(lengths=[[1, 2], [3, 4]]), ValueError, "expected "),
)  # fmt: skip


def refuses(op: Callable, arguments: dict, error: type[Exception], message: str) -> None:
    """The form of the message, and that no input changed."""
    listed = [x for value in arguments.values() for x in (value if isinstance(value, (list, tuple)) else [value])]
    tensors = [t for t in listed if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    before = [storage_bytes(t).clone() for t in tensors]
    with pytest.raises(error, match="^" + re.escape(f"lkv_ext.{op.__name__}: {message}")) as raised:
        op(**arguments)
    assert "\n" not in str(raised.value) and raised.type in (ValueError, TypeError)
    assert all(torch.equal(storage_bytes(t), old) for t, old in zip(tensors, before, strict=True))


def named(cases: tuple) -> dict:
    return dict(argnames="change, error, message", argvalues=cases, ids=[next(iter(c[0])) for c in cases])


@pytest.mark.parametrize(**named(BAD_TENSORS + BAD_INTEGERS + BAD_SPANS))
def test_evict(change: dict, error: type[Exception], message: str) -> None:
    refuses(lkv_ext.evict, dense() | change, error, message)


@pytest.mark.parametrize(**named(BAD_TENSORS + BAD_INTEGERS))
def test_evict_in_place(change: dict, error: type[Exception], message: str) -> None:
    refuses(lkv_ext.evict_, dense() | change, error, message)


@pytest.mark.parametrize(**named(BAD_RAGGED))
@pytest.mark.parametrize("op", [lkv_ext.evict, lkv_ext.evict_])
def test_ragged(op: Callable, change: dict, error: type[Exception], message: str) -> None:
    refuses(op, ragged() | change, error, message)


@pytest.mark.parametrize(**named(BAD_INTEGERS + BAD_SPANS))
def test_select(change: dict, error: type[Exception], message: str) -> None:
    refuses(lkv_ext.select, dict(scores=dense()["scores"], budgets=4) | change, error, message)


@pytest.mark.parametrize(**named(BAD_TENSORS + BAD_INTEGERS + BAD_SPANS))
def test_evict_with_gradients(change: dict, error: type[Exception], message: str) -> None:
    """The differentiable way refuses the same in the same words."""
    arguments = dense()
    arguments["v"].requires_grad_()
    if "v" in change:
        arguments["k"].requires_grad_()
    refuses(lkv_ext.evict, arguments | change, error, message)


@pytest.mark.parametrize(**named(BAD_TENSORS + BAD_INTEGERS + BAD_SPANS))
def test_evict_layers(change: dict, error: type[Exception], message: str) -> None:
    """The second layer is the bad one; integers are bad for all."""
    good = dense()
    bad = good | change
    extra = {name: value for name, value in bad.items() if name not in good}
    budgets = bad["budgets"] if "budgets" in change else 4
    if isinstance(budgets, list) and message.startswith("expected budgets of shape"):
        message = "expected budgets of shape [N, H] = [2, 3] or [N, B, H] = [2, 2, 3], got"
        budgets = budgets * 2 if len(budgets) == 2 else budgets
    arguments = dict(
        ks=[good["k"], bad["k"]],
        vs=[good["v"], bad["v"]],
        scores=[good["scores"], bad["scores"]],
        budgets=budgets,
        companions=list(zip(good["companions"] * len(bad["companions"]), bad["companions"], strict=True)),
    )
    with pytest.raises(error, match=r"^lkv_ext\.evict_layers: expected "):
        lkv_ext.evict_layers(**arguments, **extra)


def test_layer_lists() -> None:
    k, scores = dense()["k"], dense()["scores"]
    evict = lkv_ext.evict_layers
    refuses(evict, dict(ks=[], vs=[], scores=[], budgets=1), ValueError, "expected at least one layer in ks, got none")
    for lists in (dict(vs=[k]), dict(scores=[scores] * 3), dict(companions=[[scores]])):
        arguments = dict(ks=[k, k], vs=[k, k], scores=[scores, scores], budgets=1) | lists
        refuses(evict, arguments, ValueError, "expected one tensor per layer in every list, got [")
    arguments = dict(ks=[k, k[..., :4]], vs=None, scores=[scores, scores], budgets=1)
    refuses(evict, arguments, ValueError, "expected ks[1] with rows like those of the first layer")
    arguments = dict(ks=[k, k.half()], vs=None, scores=[scores, scores], budgets=1)
    refuses(evict, arguments, TypeError, "expected ks[1] of the dtype of the first layer")
    arguments = dict(ks=[k, k], vs=None, scores=[scores, scores.half()], budgets=1)
    refuses(evict, arguments, TypeError, "expected scores[1] of the same dtype as scores[0]")
    arguments = dict(ks=[k, k[:, :2]], vs=None, scores=[scores, scores[:, :2]], budgets=1)
    refuses(evict, arguments, ValueError, f"expected ks[1] {LIKE_K} [2, 2, 10, 8]")


@pytest.mark.parametrize(
    "tensors, change, error, message",
    [
        ([tensor(B, H)], {}, ValueError, "expected tensors[0] of shape [B, H, L, ...], got [2, 3]"),
        ([tensor(B, H, L), tensor(B, H, L + 1)], {}, ValueError, f"expected tensors[1] {LIKE_K} [2, 3, 11]"),
        ([tensor(B, H, L), columns(B, H, L, D)], {}, ValueError, f"expected tensors[1] {STRIDED}"),
        ([tensor(B, H, L), tensor(B, H, L, device="meta")], {}, ValueError, "expected tensors[1] on cpu, got "),
        ([tensor(1, H, L)], {}, ValueError, "expected index.cu_seqlens of shape [B * H + 1] = [4], got [7]"),
        ([tensor(B, H, L)], dict(positions=torch.zeros(24)), TypeError, "expected index.positions of dtype int32"),
        ([tensor(B, H, L)], dict(positions=ints(24, 1)), ValueError, "expected index.positions of shape"),
        ([tensor(B, H, L)], dict(positions=ints(48)[::2]), ValueError, "expected index.positions contiguous"),
        ([tensor(B, H, L)], dict(cu_seqlens=torch.zeros(7)), TypeError, "expected index.cu_seqlens of dtype int32"),
        ([tensor(B, H, L)], dict(cu_seqlens=ints(6)), ValueError, "expected index.cu_seqlens of shape"),
    ],
)  # fmt: skip
def test_gather(tensors: list, change: dict, error: type[Exception], message: str) -> None:
    index = lkv_ext.select(dense()["scores"], 4)
    for name, value in change.items():
        setattr(index, name, value)
    refuses(lkv_ext.gather, dict(tensors=tensors, index=index), error, message)


def test_plan() -> None:
    evict, arguments = lkv_ext.evict, dense()
    with pytest.raises(TypeError, match=r"^lkv_ext.plan: expected budgets of integers, got torch.float32"):
        lkv_ext.plan([0.5, 1.0])
    with pytest.raises(TypeError, match=r"^lkv_ext.plan: expected lengths of integers, got torch.bool"):
        lkv_ext.plan(3, torch.ones(2, dtype=torch.bool))
    arguments["budgets"] = lkv_ext.plan([1, 2])
    refuses(evict, arguments, ValueError, f"expected budgets {PER_HEAD} [2]")
    arguments["budgets"] = lkv_ext.plan([1, 2, 3], [1, 2, 3])
    refuses(evict, arguments, ValueError, f"expected lengths {PER_SEQUENCE} [3]")
    arguments["budgets"] = lkv_ext.plan([1, 2, 3])
    refuses(evict, arguments | dict(lengths=[1, 2]), ValueError, "expected no lengths beside a plan")


def test_unbounded_device_budgets_cannot_be_traced() -> None:
    with unreadable():
        arguments = dense() | dict(budgets=torch.tensor([1, 2, 3]))
        refuses(lkv_ext.evict, arguments, ValueError, "expected capacity or max_budget with budgets in a tensor")
