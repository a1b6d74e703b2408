"""Errors under their public names: what is kept of the message of an op, and what replaces the rest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import lkv_ext
from lkv_ext._common.errors import reraise


def raised(error: Exception, op: str = "evict", **options: object) -> tuple[type[Exception], str]:
    with pytest.raises(Exception, match=rf"^lkv_ext\.{op}: ") as caught:
        reraise(op, error, **options)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    return type(caught.value), str(caught.value).removeprefix(f"lkv_ext.{op}: ")


@pytest.mark.parametrize("cls", [ValueError, TypeError, RuntimeError, MemoryError])
def test_types_cross_the_abi_in_the_message(cls: type[Exception]) -> None:
    assert raised(RuntimeError(f"{cls.__name__}: expected\nmore (originally from here)")) == (cls, "expected\nmore")


def test_others_are_as_they_were() -> None:
    assert raised(ValueError("no type: here")) == (ValueError, "no type: here")
    assert raised(AttributeError("'list' has no 'shape'")) == (TypeError, "'list' has no 'shape'")
    assert raised(ValueError("lkv_ext.select: expected one, got two")) == (ValueError, "expected one, got two")
    assert raised(ValueError("as lkv_ext.select: says")) == (ValueError, "as lkv_ext.select: says")


def test_places_have_names() -> None:
    names, out = ["k", "v"], ["keys", "values"]
    error = RuntimeError("ValueError: expected payload[1] and out[0] as payload[0], not about[0]")
    assert raised(error, names=names)[1] == "expected v and out.k as k, not about[0]"
    assert raised(error, names=names, out=out)[1] == "expected v and out.keys as k, not about[0]"
    many = [f"n{i}" for i in range(12)]
    assert raised(RuntimeError("ValueError: payload[11]"), names=many) == (ValueError, "n11")


def test_what_the_dispatcher_refuses() -> None:
    text = "Expected a value of type 'int' for argument 'sink' but instead found type 'str'.\nPosition: 3"
    assert raised(RuntimeError(text)) == (TypeError, "expected sink as int, got str")


def test_an_argument_of_another_kind_is_named() -> None:
    """Unless the message is about that argument and has what was expected of it."""
    given = dict(sink=0.5)
    wrong = (TypeError, "expected sink as an int, got 0.5")
    assert raised(ValueError("sinks are odd"), given=given) == wrong
    assert raised(ValueError("expected sinks, got none"), given=given) == wrong
    assert raised(ValueError("sink is odd"), given=given) == wrong
    assert raised(ValueError("expected sink < 1, got 2"), given=given) == (ValueError, "expected sink < 1, got 2")
    assert raised(ValueError("odd"), given=dict(sink=1)) == (ValueError, "odd")


@pytest.mark.parametrize("error", [ValueError("scores"), RuntimeError("ValueError: scores")], ids=["Python", "C++"])
def test_a_guess_is_added(error: Exception) -> None:
    given = dict(k=torch.zeros(2, 9, 3, 4), scores=torch.zeros(2, 3, 9))
    cls, text = raised(error, given=given)
    assert cls is ValueError and text.startswith("scores (scores fit k if it were [B, L, H, D]")


@pytest.mark.parametrize("with_v", [False, True])
def test_parts_of_joint_outputs(with_v: bool) -> None:
    """Names of an output that evict_layers writes again: with V and without, and behind them companions."""
    ks, scores = [torch.zeros(1, 2, 6, 4)] * 2, [torch.zeros(1, 2, 6)] * 2
    call = dict(ks=ks, vs=ks if with_v else None, scores=scores, budgets=3, companions=[scores, scores])
    for name, change in dict(
        [("k", lambda out: setattr(out, "k", out.k[1:]))]
        + [("v", lambda out: setattr(out, "v", out.v[1:]))] * with_v
        + [(f"companions[{i}]", lambda out, i=i: cut(out, i)) for i in range(2)]
    ).items():
        out = lkv_ext.evict_layers(**call)
        change(out)
        with pytest.raises(ValueError, match=rf"^lkv_ext\.evict_layers: expected out\.{name}".replace("[", r"\[")):
            lkv_ext.evict_layers(**call, out=out)


def cut(out: lkv_ext.RaggedKV, i: int) -> None:
    out.companions = tuple(c[1:] if i == n else c for n, c in enumerate(out.companions))


@pytest.mark.parametrize(
    "wrong", [[0.0, 1.0], torch.tensor([0.0, 1.0]), np.array([0.0, 1.0]), ["0", "1"], [[0], [1]]], ids=str
)
@pytest.mark.parametrize("call", ["reorder", "select_batch", "restore"])
def test_sequences_of_a_cache_are_integers(call: str, wrong: object) -> None:
    k = torch.zeros(2, 2, 6, 4)
    cache = lkv_ext.RaggedCache(lkv_ext.evict(k, k, k[..., 0], 3, reserve=4), seen=6, free=4)
    calls: dict[str, Callable] = dict(
        reorder=cache.reorder, select_batch=cache.select_batch, restore=lambda rows: cache.restore(cache.mark(), rows)
    )
    with pytest.raises((TypeError, ValueError), match=rf"^lkv_ext\.RaggedCache\.{call}: expected .* int"):
        calls[call](wrong)
    assert cache.seen == 6 and cache.lengths.tolist() == [[3, 3], [3, 3]]
