"""Every argument of every public function x what callers put there by mistake: right, or an error that names it."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from invariants import unwatched

import lkv_ext
import lkv_ext.numpy as lkv_numpy
from lkv import reference
from lkv_ext import RaggedCache
from lkv_ext._common.kinds import SIGNATURES
from lkv_ext._torch.library import ops
from lkv_ext._torch.request import Arguments

B, H, L, D = 2, 3, 8, 4


@pytest.fixture(autouse=True)
def _wrong_on_purpose() -> Iterator[None]:
    """What a cache is given here is wrong on purpose, or nothing that the invariants can read."""
    with unwatched():
        yield


def rows(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def cache() -> RaggedCache:
    made = RaggedCache.empty(B, H, D, reserve=9)
    made.append(rows(B, H, 5, D), rows(B, H, 5, D))
    return made


def kept() -> lkv_ext.RaggedKV:
    return lkv_ext.evict(rows(B, H, L, D), rows(B, H, L, D), rows(B, H, L), 3)


def of_cache(method: str) -> Callable[..., RaggedCache]:
    def call(**arguments: object) -> object:
        made = cache()
        result = getattr(made, method)(**arguments)
        return made if result is None else result

    return call


RANK = dict(budgets=3, lengths=None, starts=None, cu_seqlens=None, sink=0, window=0, max_budget=None)
SPANS = dict(layout="packed", capacity=None, reserve=0, align=1)
K = dict(k=rows(B, H, L, D), v=rows(B, H, L, D), scores=rows(B, H, L))
RAGGED = dict(k=rows(24, D), v=rows(24, D), scores=rows(24), cu_seqlens=torch.arange(7, dtype=torch.int32) * 4)
LAYERS = dict(ks=[rows(B, H, L, D)] * 2, vs=[rows(B, H, L, D)] * 2, scores=[rows(B, H, L)] * 2)
INDEX = lkv_ext.select(rows(B, H, L), 3)


def numpys(arguments: dict) -> dict:
    return {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def numpy_index() -> lkv_numpy.RaggedIndex:
    return lkv_numpy.RaggedIndex(INDEX.positions.numpy(), INDEX.lengths.numpy(), INDEX.cu_seqlens.numpy(), 3)


CALLS: dict[str, tuple[Callable, dict]] = {
    "evict": (lkv_ext.evict, K | RANK | SPANS | dict(companions=[rows(B, H, L)], out=None)),
    "evict ragged": (lkv_ext.evict, RANK | SPANS | RAGGED | dict(companions=())),
    "evict_": (lambda k, v, **rest: lkv_ext.evict_(k, v, **rest), K | RANK | dict(companions=(), to="back", page=2)),
    "evict_paged_": (lkv_ext.evict_paged_, dict(pools=[rows(2 * B, H, L, D)] * 2, scores=K["scores"], budgets=3,
                                                tables=torch.arange(B, dtype=torch.int32)[:, None], lengths=None,
                                                sink=0, window=0, max_budget=None, to="front", check=False)),
    "evict_layers": (lkv_ext.evict_layers, {n: x for n, x in (LAYERS | RANK | SPANS).items() if n != "cu_seqlens"}
                     | dict(companions=(), out=None)),
    "select": (lkv_ext.select, dict(scores=K["scores"]) | RANK | SPANS),
    "gather": (lkv_ext.gather, dict(tensors=[K["k"]], index=INDEX, cu_seqlens=None)),
    "plan": (lkv_ext.plan, dict(budgets=3, lengths=4, device=None)),
    "attend": (lkv_ext.attend, dict(q=rows(B, 2 * H, 1, D), cache=kept(), causal=True, scale=None, softcap=None,
                                    sinks=None, backend=None)),
    "soft_topk": (lkv_ext.soft_topk, dict(scores=K["scores"], k=3.0, temperature=0.5, lengths=None, log=False)),
    "budgets_from_shares": (lkv_ext.budgets_from_shares, dict(shares=[0.5, 0.5], total=6, lengths=[8, 8], floor=0,
                                                              cap=None)),
    "budgets_from_shares retention": (lkv_ext.budgets_from_shares, dict(shares=[0.5, 0.5], retention=0.5, lengths=8)),
    "budgets_from_scores": (lkv_ext.budgets_from_scores, dict(scores=K["scores"], total=6, across="heads", floor=None,
                                                              lengths=None, starts=None, sink=0, window=0)),
    "Blend": (lkv_ext.Blend, dict(alpha=0.5)),
    "Minimum": (lkv_ext.Minimum, dict(rows=2)),
    "RaggedCache": (RaggedCache, dict(kv=kept(), seen=8, free=None, tail=0)),
    "RaggedCache.empty": (RaggedCache.empty, dict(batch=B, heads=H, dim=D, dim_v=None, dtype=torch.float32,
                                                  device=None, reserve=4, align=2)),
    "RaggedCache.append": (of_cache("append"), dict(k=rows(B, H, 2, D), v=rows(B, H, 2, D), companions=(),
                                                    valid=None)),
    "RaggedCache.evict": (of_cache("evict"), dict(scores=rows(B * H * 9), budgets=3, sink=0, window=0,
                                                  max_budget=None, reserve=None)),
    "RaggedCache.attend": (of_cache("attend"), dict(q=rows(B, 2 * H, 1, D), causal=True, scale=None, softcap=None,
                                                    sinks=None)),
    "RaggedCache.crop": (of_cache("crop"), dict(tokens=2)),
    "RaggedCache.restore": (of_cache("restore"), dict(mark=(3, 3, 3), rows=[2, 2])),
    "RaggedCache.select_batch": (of_cache("select_batch"), dict(indices=[1, 0])),
    "RaggedCache.reorder": (of_cache("reorder"), dict(beams=[1, 0])),
    "RaggedCache.padded": (of_cache("padded"), dict(rows=rows(B * H * 9))),
    "RaggedCache.packed": (of_cache("packed"), dict(scores=rows(B, H, 5))),
    "RaggedCache.to": (of_cache("to"), dict(device="cpu")),
    "RaggedKV.layer": (lambda i: lkv_ext.evict_layers(**LAYERS, budgets=3).layer(i), dict(i=1)),
    "numpy.evict": (lkv_numpy.evict, numpys(K | RANK | SPANS) | dict(companions=(), out=None, threads=1)),
    "numpy.evict ragged": (lkv_numpy.evict, numpys(RANK | SPANS | RAGGED)),
    "numpy.evict_": (lkv_numpy.evict_, numpys(K | RANK) | dict(companions=(), to="back", page=2, threads=None)),
    "numpy.select": (lkv_numpy.select, numpys(dict(scores=K["scores"]) | RANK | SPANS) | dict(threads=1)),
    "numpy.gather": (lkv_numpy.gather, dict(arrays=[K["k"].numpy()], index=numpy_index(), cu_seqlens=None, threads=1)),
}  # fmt: skip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([rows(3, 4), rows(2, 4)])
    QUANTIZED = torch.quantize_per_tensor(rows(B, H, L, D), 0.1, 0, torch.quint8)
    CSR = torch.eye(3).to_sparse_csr()

MOST = 2**63 - 1

# What counts as an int as well, and that int.
SAME = {
    "NumPy scalar": (np.int64(3), 3),
    "0-d tensor": (torch.tensor(3), 3),
    "0-d array": (np.array(3), 3),
    "beyond int64": (2**70, MOST),
    "far below": (-(2**70), -MOST - 1),
    "uint64": (torch.tensor(2**64 - 5, dtype=torch.uint64), MOST),
    "NumPy uint64": (np.uint64(2**64 - 5), MOST),
    "uint64 values": (torch.tensor([2**64 - 5, 3, 2**63], dtype=torch.uint64), [MOST, 3, MOST]),
    "huge values": ([2**70, 3, -(2**70)], [MOST, 3, -MOST - 1]),
}
WRONG = {
    "None": None,
    "text": "three",
    "bytes": b"\x03\x03\x03",
    "bool": True,
    "float": 3.0,
    "fraction": 0.5,
    "NaN": float("nan"),
    "complex": 3j,
    "mapping": {0: 3, 1: 3, 2: 3},
    "set": {3},
    "object": object(),
    "type": int,
    "function": len,
    "empty list": [],
    "list of None": [None, None, None],
    "list of text": ["3", "3", "3"],
    "list of floats": [3.0, 3.0, 3.0],
    "ragged list": [[3, 3], [3]],
    "negative": -1,
    "NumPy float": np.float32(3),
    "NumPy bool": np.bool_(True),
    "array": np.zeros((B, H, L, D)),
    "array of bools": np.ones(H, bool),
    "array of objects": np.array([None, 3, "x"], object),
    "0-d float tensor": torch.tensor(3.0),
    "0-d bool tensor": torch.tensor(True),
    "bool tensor": torch.ones(H, dtype=torch.bool),
    "complex tensor": torch.ones(B, H, L, dtype=torch.complex64),
    "float64 tensor": torch.ones(B, H, L, dtype=torch.float64),
    "float8 tensor": torch.ones(B, H, L).to(torch.float8_e4m3fn),
    "meta tensor": torch.empty(B, H, L, D, device="meta"),
    "meta scalar": torch.empty((), dtype=torch.int64, device="meta"),
    "meta integers": torch.empty(H, dtype=torch.int64, device="meta"),
    "sparse": rows(B, H, L, D).to_sparse(),
    "sparse scores": rows(B, H, L).to_sparse(),
    "sparse rows": CSR,
    "sparse integers": torch.tensor([3, 3, 3]).to_sparse(),
    "nested": NESTED,
    "quantized": QUANTIZED,
    "quantized scores": torch.quantize_per_tensor(rows(B, H, L), 0.1, 0, torch.quint8),
    "list of sparse": [rows(B, H, L, D).to_sparse()] * 2,
    "list of nested": [NESTED],
    "list of quantized": [QUANTIZED] * 2,
    "long tuple": (3,) * 50,
}


def content(result: object) -> object:
    """What can be compared."""
    if isinstance(result, RaggedCache):
        return content([result.k, result.lengths, result.cu_seqlens, result.max_length, result.seen])
    if isinstance(result, (list, tuple)):
        return [content(x) for x in result]
    if isinstance(result, (torch.Tensor, np.ndarray)):
        return result.dtype, list(result.shape) if getattr(result, "is_meta", False) else result.tolist()
    if isinstance(result, (int, float, str, type(None), lkv_ext.Blend, lkv_ext.Minimum)):
        return result
    slots = [name for name in type(result).__slots__ if name not in ("reserve", "align")]
    return [content(getattr(result, name)) for name in slots]


def fresh(arguments: dict) -> dict:
    """Copies: some calls write."""

    def copy(x: object) -> object:
        if isinstance(x, list):
            return [copy(y) for y in x]
        return x.clone() if isinstance(x, torch.Tensor) else x.copy() if isinstance(x, np.ndarray) else x

    return {name: copy(x) for name, x in arguments.items()}


def outcome(call: str, change: dict) -> object:
    """What comes of the call, or its error, which is one that names the argument."""
    function, good = CALLS[call]
    (name,) = change
    try:
        result = function(**fresh({n: x for n, x in good.items() if n != name}), **change)
    except (ValueError, TypeError, IndexError) as error:
        text = str(error)
        called = "attend" if call == "RaggedCache.attend" else call.split()[0]
        assert text.startswith(f"lkv_ext.{called}: expected "), text
        assert re.search(rf"\b{name}\b", text) or "meta" in text, text
        assert "\n" not in text and len(text) < 2000, text
        return type(error)
    return content(result)


NAMES = [(call, name) for call, (_, good) in CALLS.items() for name in good]


@pytest.mark.parametrize("call, name", NAMES, ids=[f"{call}-{name}" for call, name in NAMES])
def test_wrong(call: str, name: str) -> None:
    failed = []
    for kind, value in WRONG.items():
        try:
            outcome(call, {name: value})
        except Exception as error:
            failed.append(f"{kind}: {type(error).__name__}: {str(error)[:300]}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("call, name", NAMES, ids=[f"{call}-{name}" for call, name in NAMES])
def test_integers_of_other_types(call: str, name: str) -> None:
    """An error, or what the int would have done; beyond 64 bits, what any number of rows would that is too large."""
    if name == "shares":
        pytest.skip("shares are reals, and too large for none")
    for kind, (value, plain) in SAME.items():
        got, want = outcome(call, {name: value}), outcome(call, {name: plain})
        assert got == want or ValueError in (got, want) or TypeError in (got, want), kind


@pytest.mark.parametrize("name", ["budgets", "sink", "window", "max_budget", "capacity", "reserve", "align"])
@pytest.mark.parametrize("call", ["evict", "evict_", "select"])
def test_the_memo_tells_1_from_its_equals(call: str, name: str) -> None:
    if name not in CALLS[call][1]:
        pytest.skip(f"{call} has no {name}")
    for _ in range(2):
        assert outcome(call, {name: 1}) not in (ValueError, TypeError)
        assert outcome(call, {name: 1.0}) is TypeError and outcome(call, {name: True}) is TypeError


def test_a_tensor_of_each_name_is_known() -> None:
    """The table of kinds has every argument of every public function."""
    public = {name: getattr(lkv_ext, name) for name in lkv_ext.__all__ if name != "build_info"}
    methods = {f"RaggedCache.{name}": method for name, method in inspect.getmembers(RaggedCache, callable)}
    for name, function in (public | methods).items():
        if name in SIGNATURES:
            arguments = set(inspect.signature(function).parameters) - {"self"}
            assert arguments - {"path", "sinks"} <= SIGNATURES[name].keys(), name


KIND_OF = {
    "Ints | Plan": "integers",
    "Ints": "integers",
    "int": "count",
    "str": "text",
    "bool": "flag",
    "Tensor": "array",
    "np.ndarray": "array",
    "Sequence[Tensor]": "arrays",
    "Sequence[np.ndarray]": "arrays",
    "RaggedKV": "RaggedKV",
    "RaggedIndex": "RaggedIndex",
}


@pytest.mark.parametrize("module", [lkv_ext, lkv_numpy], ids=lambda module: module.__name__)
def test_kinds_are_those_of_the_signatures(module: ModuleType) -> None:
    """The table of kinds agrees with the annotations, `None` included."""
    for name in ("evict", "evict_", "select", "gather"):
        for argument in inspect.signature(getattr(module, name)).parameters.values():
            form = argument.annotation.removesuffix(" | None")
            optional = "?" if form != argument.annotation else ""
            assert SIGNATURES[name][argument.name] == KIND_OF[form] + optional, (name, argument.name)


def test_defaults_are_the_same_everywhere() -> None:
    """Defaults of the public functions of torch and NumPy, and of the specification."""
    functions = [lkv_ext.evict, lkv_ext.evict_, lkv_ext.evict_layers, lkv_ext.select]
    functions += [lkv_numpy.evict, lkv_numpy.evict_, lkv_numpy.select, reference.evict, reference.evict_layers]
    seen: dict[str, object] = {}
    for function in functions:
        for name, argument in inspect.signature(function).parameters.items():
            if argument.default is not inspect.Parameter.empty:
                assert argument.default == seen.setdefault(name, argument.default), (function.__qualname__, name)
    assert {"lengths", "starts", "sink", "window", "layout", "capacity", "max_budget", "reserve", "align"} < seen.keys()


def test_shared_arguments_of_the_ops() -> None:
    """One table for all four ops, and for the request of the NumPy front end, which has no values on a device."""
    for op in (ops.evict, ops.evict_out, ops.evict_):
        given = [(a.name, a.default_value) for a in op.default._schema.arguments]
        shared = [(a.name, a.default_value) for a in ops.select.default._schema.arguments[1:]]
        assert given[-len(shared) :] == shared
    assert (
        Arguments._fields[:2] == ("budgets", "total") and len(Arguments._field_defaults) == len(Arguments._fields) - 2
    )
    on_host = [name for name in Arguments._fields if not name.endswith("_tensor") and name != "count_overflow"]
    words = re.findall(r"(\w+): ", lkv_numpy._C.Request.__init__.__doc__.split("->")[0])
    assert [word for word in words if word != "self"] == ["threads", *on_host]


@pytest.mark.parametrize("op", [lkv_ext.evict, lkv_ext.evict_, lkv_numpy.evict, lkv_ext.evict_layers])
@pytest.mark.parametrize("budgets", [3, [3, 3, 3]])
def test_a_forgotten_transpose_is_guessed(op: Callable, budgets: object) -> None:
    k, scores = rows(B, L, H, D), rows(B, H, L)
    k, scores = (t.numpy() if op is lkv_numpy.evict else t for t in (k, scores))
    given = ([k], [k], [scores]) if op is lkv_ext.evict_layers else (k, k, scores)
    name = "ks" if op is lkv_ext.evict_layers else "k"
    with pytest.raises(ValueError, match=rf"expected .*\(scores fit {name} if it were \[B, L, H, D\]"):
        op(*given, budgets)


def test_what_does_not_fit_in_int32() -> None:
    """No memory is needed: all rows are one."""
    k, scores = torch.ones(1, 1, 1, 1).expand(1, 1, 2**31, 1), torch.zeros(1, 1, 1).expand(1, 1, 2**31)
    for call in (lambda: lkv_ext.evict(k, None, scores, 3, window=3), lambda: lkv_ext.select(scores, 2, window=2),
                 lambda: lkv_ext.evict_layers([k], None, [scores], 3, window=3),
                 lambda: lkv_numpy.select(scores.numpy(), 2, window=2)):  # fmt: skip
        with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 tokens, as positions are int32, got 2147483648"):
            call()
    last = lkv_ext.select(scores[:, :, :-1], 2, window=2)
    assert last.positions.tolist() == [2**31 - 3, 2**31 - 2]
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 rows"):
        lkv_ext.select(rows(B, H, L), 1, reserve=2**30)
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 rows"):
        RaggedCache.empty(2**10, 2**10, D, reserve=2**12)


PARTS = ("k", "v", "companions", "positions", "lengths", "cu_seqlens", "max_length")
OF_PARTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "evict out": (lambda kv: lkv_ext.evict(**K, budgets=3, out=kv), PARTS[:-1]),
    "attend cache": (lambda kv: lkv_ext.attend(rows(B, H, 1, D), kv), ("k", "v", *PARTS[4:])),
    "RaggedCache kv": (lambda kv: RaggedCache(kv, 8), PARTS),
    "gather index": (lambda kv: lkv_ext.gather([K["k"]], kv.index), ("positions", "cu_seqlens")),
    "gather index ragged": (
        lambda kv: lkv_ext.gather([rows(48, D)], kv.index, cu_seqlens=torch.arange(7, dtype=torch.int32) * 8),
        PARTS[3:6],
    ),
}


@pytest.mark.parametrize("call, part", [(call, part) for call, (_, parts) in OF_PARTS.items() for part in parts])
def test_parts_of_what_was_returned(call: str, part: str) -> None:
    """What evict and select returned may have been changed since."""
    function, name = OF_PARTS[call][0], call.split()[1]
    kinds = (
        "text",
        "fraction",
        "mapping",
        "object",
        "meta integers",
        "sparse",
        "nested",
        "quantized",
        "complex tensor",
    )
    for value in (*(WRONG[kind] for kind in kinds), 2**70, -1):
        kv = kept()
        setattr(kv, part, value)
        with pytest.raises((ValueError, TypeError), match=r"^lkv_ext\.\w+: expected ") as error:
            function(kv)
        message = str(error.value)
        assert name in message or re.search(rf"\b{part}\b", message) or "meta" in message or "cu_seqlens" in message, (
            message
        )
