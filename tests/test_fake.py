"""The fake kernels of the raw ops against the ops: sizes, dtypes and strides of all that they return."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from cases import DTYPES, SCORE_DTYPES, rows_of
from test_raw_ops import good, offsets, op_of
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import lkv_ext
from lkv_ext._torch.fake import MOST
from lkv_ext._torch.library import ops


def facts(result: object) -> list[tuple]:
    leaves = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    return [(tuple(t.shape), t.dtype, t.stride(), t.device) for t in leaves]


def same(op: Callable, arguments: dict) -> None:
    with FakeTensorMode() as mode:
        fake = facts(op(**pytree.tree_map_only(Tensor, mode.from_tensor, arguments)))
    assert fake == facts(op(**arguments))


def index(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def other_calls() -> dict[str, dict]:
    """Layers, padding, overflow that is counted, empty tensors, no heads."""
    sizes, scores = dict(budgets=[2], total=12), torch.randn(2, 3, 7)
    k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 5, 2)
    many = dict(budgets=[2], total=24)
    calls = {}
    for name in ("select", "evict", "evict_"):
        payload = {} if name == "select" else {"payload": [k, v]}
        both = {} if name == "select" else {"payload": [k.clone(), k.clone(), v.clone(), v.clone()]}
        calls |= {
            f"{name}_padded": dict(**payload, scores=[scores], **sizes, padded=2),
            f"{name} overflow": dict(**payload, scores=[scores], **sizes, count_overflow=True),
            f"{name}_layers": dict(**both, scores=[scores, scores], **many),
            f"{name}_layers padded": dict(**both, scores=[scores, scores], **many, padded=2, count_overflow=True),
        }
        for batch, heads, tokens in ((0, 3, 7), (2, 0, 7), (2, 3, 0), (0, 0, 0)):
            shape = (batch, heads, tokens)
            empty = {} if name == "select" else {"payload": [torch.randn(*shape, 4), torch.randn(*shape)]}
            given = dict(**empty, scores=[torch.randn(shape)], budgets=[2], total=0)
            calls |= {f"{name} {shape}": given, f"{name}_padded {shape}": given | dict(padded=0)}
    one = lkv_ext.select(scores, 2)
    padded = lkv_ext.select(scores, 2, layout="padded")
    joint = ops.select([scores, -scores], **many)
    calls |= {
        "gather of all": dict(tensors=[k, v, scores], positions=one.positions, cu_seqlens=one.cu_seqlens),
        "gather_padded": dict(tensors=[k, v], positions=padded.positions, cu_seqlens=padded.cu_seqlens),
        "gather_layers": dict(tensors=[k, -k, v, -v], positions=joint[0], cu_seqlens=joint[2], layers=2),
        "gather empty": dict(tensors=[k[:, :, :0]], positions=index(0), cu_seqlens=index(7)),
        "gather no heads": dict(tensors=[k[:, :0]], positions=index(0), cu_seqlens=index(1)),
        "attend of other widths": dict(q=torch.randn(2, 6, 3, 4).half(), k=torch.randn(60, 4), v=torch.randn(60, 9),
                                       cu_seqlens=offsets(), lengths=index(2, 3) + 7, longest=7, causal=False,
                                       scale=0.5, softcap=2.0, sinks=torch.randn(6)),
        "attend_paged of other widths": dict(q=torch.randn(2, 6, 3, 4).half(), k=torch.randn(9, 4, 4),
                                             v=torch.randn(9, 4, 9), tables=index(2, 3, 2), lengths=index(2, 3) + 7,
                                             longest=7, causal=False, scale=0.5, softcap=2.0, sinks=torch.randn(6)),
        "attend no queries": dict(q=torch.randn(2, 6, 0, 4), k=torch.randn(60, 4), v=torch.randn(60, 4),
                                  cu_seqlens=offsets(), lengths=index(2, 3), longest=0, causal=True, scale=0.5),
    }  # fmt: skip
    return calls


def called(name: str) -> Callable:
    return op_of(name.split(" ")[0])


@pytest.mark.parametrize("call", [*good(), *other_calls()])
def test_as_the_op(call: str) -> None:
    same(called(call), (good() | other_calls())[call])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rows_of_every_dtype(dtype: torch.dtype) -> None:
    k, companion = rows_of([2, 3, 7, 4], dtype), rows_of([2, 3, 7], torch.float64)
    for of_scores in SCORE_DTYPES:
        scores = torch.randn(2, 3, 7).to(of_scores)
        for payload in ([k, companion], [companion, k]):
            same(ops.evict, dict(payload=payload, scores=[scores], budgets=[2], total=12))
            same(ops.evict_, dict(payload=payload, scores=[scores], budgets=[2], total=12))
            kept = lkv_ext.select(scores, 2)
            same(ops.gather, dict(tensors=payload, positions=kept.positions, cu_seqlens=kept.cu_seqlens))
        same(ops.evict_plain, dict(k=k, v=companion[..., None], scores=scores, budgets=[2], total=12))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 0, 7), (3, 0), (0, 5), (1, 2, 1, 2, 9)], ids=str)
@pytest.mark.parametrize("dtype", [*SCORE_DTYPES, torch.float64], ids=str)
def test_soft_topk(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape).to(dtype)
    for log in (False, True):
        forward = dict(scores=scores, k=None, k_value=2.0, temperature=None, temperature_value=0.5, lengths=None)
        same(ops.soft_topk, forward | dict(log=log))
        mask, weights = ops.soft_topk(**forward, log=log)
        element = [*SCORE_DTYPES, torch.float64].index(dtype)
        for wanted in ((True, True), (True, False), (False, True), (False, False)):
            backward = dict(grad=mask.clone(), mask=mask, weights=weights, temperature=None, temperature_value=0.5)
            rest = dict(lengths=None, element=element, log=log, to_scores=wanted[0], to_temperature=wanted[1])
            same(ops.soft_topk_backward, backward | rest)


def relaxed(scores: Tensor, k: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (scores, k, temperature)]
    mask = lkv_ext.soft_topk(*leaves)
    return mask, *torch.autograd.grad((mask * mask).sum(), leaves)


def moved(k: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    leaf = k.detach().requires_grad_()
    out = lkv_ext.evict(leaf, leaf * 2, scores, 3, companions=[leaf[..., 0]])
    return out.k, out.companions[0], *torch.autograd.grad((out.k * out.v).sum(), leaf)


DOUBLES = {
    "soft_topk": (
        relaxed,
        lambda: (torch.randn(2, 9).double(), torch.rand(2).double() * 8, torch.tensor(0.5).double()),
    ),
    "evict": (moved, lambda: (torch.randn(2, 3, 7, 4).double(), torch.randn(2, 3, 7))),
}


@pytest.mark.parametrize("op", DOUBLES)
def test_float64_in_every_mode(op: str) -> None:
    """As fake tensors, traced and compiled, with gradients: what gradcheck and tests of users run."""
    function, arguments = DOUBLES[op]
    given = arguments()
    want = function(*given)
    assert all(t.dtype == torch.float64 for t in want)
    with FakeTensorMode() as mode:
        assert facts(function(*(mode.from_tensor(t) for t in given))) == facts(want)
    for tracing in ("real", "fake", "symbolic"):
        graph = make_fx(function, tracing_mode=tracing)(*given)
        assert all(torch.equal(a, b) for a, b in zip(graph(*given), want, strict=True)), tracing
    torch._dynamo.reset()
    fast = torch.compile(lambda *leaves: function_without_grad(op, *leaves), backend="aot_eager", fullgraph=True)
    got = fast(*given)
    assert got.dtype == torch.float64 and torch.equal(got, want[0])


def function_without_grad(op: str, *leaves: Tensor) -> Tensor:
    return lkv_ext.soft_topk(*leaves) if op == "soft_topk" else lkv_ext.evict(leaves[0], leaves[0], leaves[1], 3).k


@pytest.mark.parametrize(
    ("total", "padded", "right"),
    [(MOST, -1, True), (MOST + 1, -1, False), (0, -1, True), (-1, -1, False), (12, 2, True), (11, 2, False)],
)
def test_sizes_are_those_that_the_op_takes(total: int, padded: int, right: bool) -> None:
    """Up to as many rows as int32 counts, and padded ones as many as their shape has."""
    with FakeTensorMode() as mode:
        given = dict(scores=[mode.from_tensor(torch.randn(2, 3, 7))], budgets=[2], total=total, padded=padded)
        if right:
            assert ops.select(**given)[0].numel() == total
            return
        with pytest.raises(RuntimeError, match=rf"at most 2\*\*31 - 1 rows, 6 spans of {padded}, got {total}"):
            ops.select(**given)


@pytest.mark.parametrize("device_knows", ["lengths", "starts", "neither"])
def test_overflow_is_counted_where_the_device_alone_knows_a_size(device_knows: str) -> None:
    there = dict(device="meta")
    options = {} if device_knows == "neither" else {device_knows: torch.empty(1, dtype=torch.int32, **there)}
    for others in ({}, dict(lengths=[5])):
        if device_knows != "lengths" or not others:
            k, scores = torch.empty(1, 2, 8, 4, **there), torch.empty(1, 2, 8, **there)
            out = lkv_ext.evict(k, k, scores, [3, 3], **options, **others)
            assert (out.overflow is None) == (device_knows == "neither")


def test_gather_of_layers() -> None:
    """One index for all layers of a list, rows and gradients: as each layer alone."""
    scores = torch.randn(2, 2, 3, 7, generator=torch.Generator().manual_seed(1))
    tensors = [torch.randn(2, 3, 7, d, dtype=torch.float64, requires_grad=True) for d in (4, 4, 5, 5)]
    budgets = [2, 1, 3, 0, 2, 4, 7, 1, 1, 1, 0, 2]
    positions, _, cu_seqlens = ops.select(list(scores), budgets, sum(budgets))
    together = ops.gather(tensors, positions, cu_seqlens, 2)
    for i in range(2):
        index = lkv_ext.select(scores[i], torch.tensor(budgets[6 * i : 6 * i + 6]).view(2, 3))
        alone = lkv_ext.gather([tensors[i], tensors[2 + i]], index)
        rows = slice(int(cu_seqlens[6 * i]), int(cu_seqlens[6 * i + 6]))
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[rows], b)
            options = dict(retain_graph=True, allow_unused=True)
            both = [torch.autograd.grad((t * t).sum(), tensors, **options) for t in (a[rows], b)]
            for of, mine, theirs in zip(tensors, *both, strict=True):
                zero = torch.zeros_like(of)
                assert torch.equal(zero if mine is None else mine, zero if theirs is None else theirs)


# As the ops name their tensors; all others by the name of the argument.
NAMED = {
    "evict_paged_": dict(pools="payload"),
    "evict_plain": dict(k="payload[0]", v="payload[1]"),
    "gather": dict(positions="index.positions", cu_seqlens="index.cu_seqlens", source_cu_seqlens="cu_seqlens"),
    "append_": dict(positions="cache.positions", lengths="cache.lengths", rows="payload", cache="cache"),
}
FIRST = dict(evict_paged_="pools", evict_plain="k", attend="q", attend_paged="q", gather="tensors", append_="rows")
PARTS = ("out[0]", "out[1]", "out.positions", "out.lengths", "out.cu_seqlens")


def name_of(op: str, argument: str, i: int, count: int) -> str:
    if argument == "out":
        return PARTS[i]
    name = NAMED.get(op, {}).get(argument, "payload" if argument == "tensors" else argument)
    return name if argument in ("scores", "tables") and count == 1 else f"{name}[{i}]" if count else name


# Not those of one tensor, and not soft_topk, whose arguments are made by its own wrapper.
@pytest.mark.parametrize("call", [x for x in good() if x not in ("select", "select_ragged") and "soft" not in x])
def test_tensors_in_two_places_are_refused(call: str) -> None:
    """By the name of the one that is not where the first is, which the rows of K are."""
    op = call.removesuffix("_ragged").removesuffix("_padded").removesuffix("_layers")
    module = "paged" if op == "evict_paged_" else op.split("_")[0]
    kernel = getattr(import_module(f"lkv_ext._torch.{module}"), f"fake_{op}")
    given = {name: x for name, x in good()[call].items() if op != "gather" or name not in ("batch", "heads")}
    for name, value in given.items():
        parts = value if isinstance(value, list) else [value]
        for i, part in enumerate(parts):
            if not isinstance(part, Tensor) or (name == FIRST.get(op, "payload") and i == 0):
                continue
            moved = [x.to("meta") if n == i else x for n, x in enumerate(parts)]
            words = name_of(op, name, i, len(parts) if isinstance(value, list) else 0)
            with pytest.raises(RuntimeError, match="^ValueError: expected " + re.escape(f"{words} on cpu, got meta")):
                kernel(**given | {name: moved if isinstance(value, list) else moved[0]})
