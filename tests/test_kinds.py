"""The kinds of arguments: which values are of each, how a wrong one is described, and which of several is named."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lkv_ext
import lkv_ext.numpy as lkv_numpy
from lkv_ext._common.kinds import FIELDS, KINDS, SIGNATURES, described, fault, guess, is_of

F32, I64, BOOL = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
SPARSE, META = torch.zeros(2, 3).to_sparse(), torch.zeros(2, dtype=torch.int64, device="meta")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torch has on trial, and of what it will give up
    QUANTIZED = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
ARRAY, TEXTS, OBJECTS = np.zeros((2, 3), np.float32), np.array(["a"]), np.array([None])
PLAN = type("Plan", (), {})()
CACHE = SimpleNamespace(cu_seqlens=1)

# By kind: what is of it, and what is not.
VALUES: dict[str, tuple[list, list]] = {
    "integers": (
        [0, -1, [1, 2], [[1], [2]], [], np.int64(3), np.arange(3), I64, PLAN, (np.int32(1), 2)],
        [
            None,
            True,
            1.0,
            "1",
            [1.0],
            [True],
            ["1"],
            F32,
            BOOL,
            META,
            SPARSE,
            ARRAY,
            TEXTS,
            OBJECTS,
            np.float32(1),
            {1},
        ],
    ),
    "count": ([0, -3, np.int64(2), torch.tensor(4), 2**70], [None, True, 1.0, "1", [1], I64, np.bool_(True), F32]),
    "rows": ([0, 2**31 - 1], [2**31, 1.0, True, None]),
    "number": ([0, 1.5, np.float32(2), float("nan")], [None, True, "1", 1j, [1.0], F32]),
    "numbers": (
        [1, 0.5, [0.5, 1], [[0.5], [1]], F32, I64, ARRAY, np.arange(2)],
        [None, True, "1", 1j, [1j], [True], BOOL, F32 * 1j, TEXTS, OBJECTS, SPARSE, META, ARRAY > 0],
    ),
    "flag": ([True, False], [None, 0, 1, "yes", np.bool_(True)]),
    "text": (["packed", ""], [None, 1, b"packed", ["packed"]]),
    "device": (["cpu", torch.device("cpu")], [None, 0, F32]),
    "floor": ([lkv_ext.Blend(0.5), lkv_ext.Minimum(3)], [None, 0.5, 3]),
    "tensor": ([F32, I64, META], [None, SPARSE, NESTED, QUANTIZED, ARRAY, [F32], 1.0]),
    "tensors": ([[F32, I64], (F32,), []], [None, F32, [SPARSE], [F32, None], [ARRAY], "t"]),
    "tensor or tensors": ([F32, [F32], ()], [None, SPARSE, [SPARSE], [1]]),
    "lists of tensors": ([[[F32], [F32, F32]], [], [[]]], [None, [F32], [[ARRAY]], [[F32], None], F32]),
    "tensors or lists of tensors": ([[F32, I64], [[F32], [F32]], []], [None, F32, [[ARRAY]], [F32, [F32]], 1.0]),
    "array": ([ARRAY, TEXTS, OBJECTS], [None, F32, [1.0], [ARRAY]]),
    "arrays": ([[ARRAY], ()], [None, ARRAY, [F32], [[ARRAY]]]),
    "array or arrays": ([ARRAY, [ARRAY]], [None, F32, [F32]]),
    "lists of arrays": ([[[ARRAY]]], [None, [ARRAY], [[F32]]]),
    "arrays or lists of arrays": ([[ARRAY], [[ARRAY]]], [None, ARRAY, [F32]]),
    "RaggedCache": ([CACHE], [None, F32]),
}
EVICTED = lkv_ext.evict(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4), 2)
VALUES["RaggedKV"] = [EVICTED], [None, lkv_ext.select(torch.zeros(1, 2, 4), 2), CACHE]
VALUES["RaggedIndex"] = [EVICTED, lkv_ext.select(torch.zeros(1, 2, 4), 2)], [None, CACHE, F32]


def test_every_kind_is_here() -> None:
    assert VALUES.keys() == KINDS.keys()
    words = {kind.rstrip("?") for kinds in (FIELDS, *SIGNATURES.values()) for kind in kinds.values()}
    assert words <= KINDS.keys()


@pytest.mark.parametrize("kind", VALUES)
def test_kinds(kind: str) -> None:
    fitting, others = VALUES[kind]
    for value in fitting:
        assert is_of(kind, value), described(value)
    for value in others:
        assert not is_of(kind, value), described(value)


@pytest.mark.parametrize(
    "value, words",
    [
        (F32, "a tensor of shape [2, 3] and torch.float32"),
        (SPARSE, "a sparse_coo tensor of shape [2, 3] and torch.float32"),
        (NESTED, "a nested tensor and torch.float32"),
        (QUANTIZED, "a quantized tensor of shape [2] and torch.qint8"),
        (ARRAY, "an array of shape [2, 3] and float32"),
        (np.float32(1.5), "np.float32(1.5)"),
        ("a\n b", r"'a\n b'"),
        (SimpleNamespace(a=1), "namespace(a=1)"),
        ([10] * 24, str([10] * 24)),
        ([10] * 25, "list " + str([10] * 25)[:80] + " ..."),
        ([1.0] * 20, "list " + str([1.0] * 20)[:80] + " ..."),
    ],
)
def test_descriptions(value: object, words: str) -> None:
    """Up to 99 characters as it is, longer ones cut."""
    assert described(value) == words


def test_the_first_wrong_argument_is_named() -> None:
    fine = dict(k=F32, v=F32, scores=F32, budgets=3)
    assert fault("evict", fine) is None and fault("unknown", dict(k=1)) is None
    assert fault("evict", fine | dict(v=None, lengths=None, out=None)) is None
    assert fault("evict", fine | dict(budgets=1.5, scores=3)) == ("scores", "expected scores as a dense tensor, got 3")
    name, message = fault("evict", fine | dict(lengths="abc"))
    assert name == "lengths"
    assert message == "expected lengths as an int, a sequence of ints or a tensor of integers or None, got 'abc'"
    assert fault("numpy.evict", dict(k=F32))[1].startswith("expected k as an array, got a tensor")
    assert fault("numpy.evict", dict(k=ARRAY, budgets=True))[0] == "budgets"
    assert fault("evict", dict(k=ARRAY))[1] == "expected k as a dense tensor, got an array of shape [2, 3] and float32"


def test_parts_of_what_was_returned_are_named() -> None:
    index = lkv_ext.select(torch.zeros(1, 2, 4), 2)
    assert fault("gather", dict(tensors=[F32], index=index)) is None
    for part, wrong in (("positions", None), ("lengths", [1]), ("cu_seqlens", SPARSE), ("max_length", 2**31)):
        name, message = fault("gather", dict(index=replace(index, **{part: wrong})))
        assert name == f"index.{part}" and message.startswith(f"expected index.{part} as ")
    assert fault("gather", dict(index=replace(index, overflow=None))) is None
    assert fault("evict", dict(out=replace(EVICTED, v=None))) is None
    assert fault("evict", dict(out=replace(EVICTED, k=None)))[0] == "out.k"


def test_axes_that_were_confused() -> None:
    def of(k: tuple, scores: tuple, **others: object) -> str:
        return guess(dict(k=np.zeros(k), scores=np.zeros(scores), **others))

    hint = " (scores fit k if it were [B, L, H, D]: pass it with transpose(1, 2), or swapaxes of NumPy)"
    assert of((2, 9, 3, 4), (2, 3, 9)) == hint
    assert of((2, 9, 3, 4), (2, 3, 9), cu_seqlens=None) == hint and of((2, 9, 3, 4), (2, 3, 9), cu_seqlens=1) == ""
    for k, scores in (((2, 9, 3, 4), (2, 9, 3)), ((2, 3, 3, 4), (2, 3, 3)), ((2, 9, 3, 4), (1, 3, 9)),
                      ((9, 3, 4), (3, 9)), ((2, 9, 3, 4), (2, 4, 9))):  # fmt: skip
        assert of(k, scores) == ""
    assert guess(None) == guess({}) == guess(dict(k=np.zeros((2, 9, 3, 4)))) == guess(dict(k=None, scores=3)) == ""
    layers = guess(dict(ks=[np.zeros((2, 9, 3, 4))], scores=[np.zeros((2, 3, 9))]))
    assert layers == hint.replace("fit k", "fit ks") and guess(dict(ks=[], scores=[])) == ""


@pytest.mark.parametrize("name", [x for x in SIGNATURES if not x.startswith("RaggedCache.load")])
def test_every_parameter_has_a_kind(name: str) -> None:
    found = lkv_ext
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    if name in ("evict", "evict_", "evict_paged_", "select", "gather"):  # these are NumPy's as well
        parameters = parameters | inspect.signature(getattr(lkv_numpy, name)).parameters
    unknown = {"lengths", "starts"} if name == "RaggedCache.evict" else set()  # a cache has its own
    assert set(parameters) - {"self"} == set(SIGNATURES[name]) - unknown
