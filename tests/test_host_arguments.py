"""What both front ends make of integers on the host, one function at a time: values, forms, bounds, and errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lkv_ext._common import options as a
from lkv_ext._common.options import Options
from lkv_ext._common.sizes import Segments

MOST = 2**31 - 1
PLAIN = Options(0, 0, "packed", None, None, 0, 1)


def wrong(call: object, *given: object, **more: object) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(*given, **more)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_integers() -> None:
    for value in (3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)):
        assert a.integer(value, "x") == 3
    for value in (True, np.bool_(True), torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", None, [3]):
        assert wrong(a.integer, value, "x").startswith("TypeError: expected x as an int, got ")
    assert (a.whole(0, "x"), a.whole(MOST, "x"), a.whole(2, "x", least=2)) == (0, MOST, 2)
    assert wrong(a.whole, -1, "x") == "ValueError: expected x in [0, 2**31 - 1], got -1"
    assert wrong(a.whole, MOST + 1, "x") == "ValueError: expected x in [0, 2**31 - 1], got 2147483648"
    assert wrong(a.whole, 1, "x", least=2) == "ValueError: expected x in [2, 2**31 - 1], got 1"


def test_options_are_ints() -> None:
    given = Options(np.int32(1), torch.tensor(2), "padded", np.int64(8), 2**70, 3, 4)
    options = a.check_options(given)
    assert options == (1, 2, "padded", 8, 2**63 - 1, 3, 4, 0, False)
    assert all(type(x) is int for x in options[:-1] if x != "padded") and options.any_order is False
    assert a.check_options(PLAIN) == PLAIN
    assert a.check_options(PLAIN._replace(sink=2**64, window=2**63, capacity=2**63)) == (
        2**63 - 1, 2**63 - 1, "packed", 2**63 - 1, None, 0, 1, 0, False,
    )  # fmt: skip
    large = a.check_options(PLAIN._replace(align=MOST, reserve=MOST))
    assert (large.align, large.reserve) == (MOST, MOST)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(layout="paged"), "ValueError: expected layout 'packed' or 'padded', got 'paged'"),
        (dict(layout=1), "ValueError: expected layout 'packed' or 'padded', got 1"),
        (dict(sink=-1), "ValueError: expected sink, window and reserve >= 0 and align >= 1, got -1, 0, 0 and 1"),
        (dict(window=-1), "ValueError: expected sink, window and reserve >= 0 and align >= 1, got 0, -1, 0 and 1"),
        (dict(reserve=-1), "ValueError: expected sink, window and reserve >= 0 and align >= 1, got 0, 0, -1 and 1"),
        (dict(align=0), "ValueError: expected sink, window and reserve >= 0 and align >= 1, got 0, 0, 0 and 0"),
        (dict(align=MOST + 1), "ValueError: expected align of at most 2**31 - 1, got 2147483648"),
        (dict(reserve=2**31), "ValueError: expected at most 2**31 - 1 rows in the output, got a reserve of 2147483648"),
        (dict(capacity=1.0), "TypeError: expected capacity as an int, got 1.0"),
        (dict(max_budget=True), "TypeError: expected max_budget as an int, got True"),
        (dict(window="2"), "TypeError: expected window as an int, got '2'"),
    ],
)  # fmt: skip
def test_wrong_options(change: dict, message: str) -> None:
    assert wrong(a.check_options, PLAIN._replace(**change)) == message


def test_64_bits_bound_rows() -> None:
    edge = 2**63
    values = [None, 0, -5, edge - 1, edge, edge + 9, -edge, -edge - 1, 3 - edge]
    assert [a.bounded(x) for x in values] == [None, 0, -5, edge - 1, edge - 1, edge - 1, -edge, -edge, 3 - edge]


def test_flat_lists_and_their_shapes() -> None:
    assert a.flatten([1, 2, 3], "x") == ([1, 2, 3], (3,)) and a.flatten([], "x") == ([], (0,))
    assert a.flatten([[1, 2], (3, 4), [5, 6]], "x") == ([1, 2, 3, 4, 5, 6], (3, 2))
    assert a.flatten(np.arange(6).reshape(2, 3), "x") == ([0, 1, 2, 3, 4, 5], (2, 3))
    assert a.flatten(np.zeros((2, 0), int), "x") == ([], (2, 0)) and a.flatten([[], []], "x") == ([], (2, 0))
    assert a.flatten([torch.tensor(1), np.int8(2)], "x") == ([1, 2], (2,))
    assert a.flatten([1.5], "x", trusted=True) == ([1.5], (1,)) and a.flatten([[1.5]], "x", trusted=True)[0] == [1.5]
    for given, message in {
        "12": "x as an int, a sequence of ints or a tensor, got '12'",
        b"12": "x as an int, a sequence of ints or a tensor, got b'12'",
        5.0: "x as an int, a sequence of ints or a tensor, got 5.0",
    }.items():
        assert wrong(a.flatten, given, "x") == f"TypeError: expected {message}"
    assert wrong(a.flatten, [1.5, 2], "x") == "TypeError: expected x of integers, got [1.5, 2]"
    assert wrong(a.flatten, np.array([True]), "x") == "TypeError: expected x of integers, got bool"
    assert wrong(a.flatten, np.array([[1.0]]), "x").startswith("TypeError: expected x of integers, got ")
    assert wrong(a.flatten, [[1, 2], [3]], "x") == "ValueError: expected x with rows of one length, got lengths [2, 1]"


def test_host_integers() -> None:
    shapes = [(3,), (2, 3)]
    assert a.host_ints(7, "budgets", shapes) == (7,) and a.host_ints([7], "budgets", shapes) == [7]
    assert a.host_ints([1, 2, 3], "budgets", shapes) == [1, 2, 3]
    assert a.host_ints([[1, 2, 3], [4, 5, 2**70]], "budgets", shapes) == [1, 2, 3, 4, 5, 2**63 - 1]
    assert a.host_ints([-(2**70), 0, 1], "budgets", shapes) == [-(2**63), 0, 1]
    assert a.host_ints(2**64, "budgets", shapes) == (2**63 - 1,) and a.host_ints([], "budgets", [(0,)]) == []
    assert wrong(a.host_ints, [1, 2], "budgets", shapes) == (
        "ValueError: expected budgets of shape [H] = [3] or [B, H] = [2, 3], got [2]"
    )
    assert wrong(a.host_ints, True, "budgets", shapes) == "TypeError: expected budgets as an int, got True"


def test_shapes_that_integers_may_have() -> None:
    assert a.integer_shapes(Segments(1, 2, 3, [9])) == ([(3,), (2, 3)], [(2,), (2, 3)])
    stacked = [(4, 3), (4, 2, 3)], [(2,), (2, 3), (4, 2, 3)]
    assert a.integer_shapes(Segments(4, 2, 3, [9], stacked=True)) == stacked
    forms = (
        ("budgets", stacked[0], "budgets of shape [N, H] = [4, 3] or [N, B, H] = [4, 2, 3]"),
        ("budgets", [(3,), (2, 3)], "budgets of shape [H] = [3] or [B, H] = [2, 3]"),
        ("lengths", stacked[1], "lengths of shape [B] = [2] or [B, H] = [2, 3] or [N, B, H] = [4, 2, 3]"),
    )
    for name, shapes, words in forms:
        assert str(a.wrong_shape(name, shapes, (9, 9))) == f"expected {words}, got [9, 9]"
    assert a.is_one_of((2, 3), [(3,), (2, 3)]) and a.is_one_of(torch.Size([3]), [(3,)])
    assert not a.is_one_of((2,), [(3,), (2, 3)]) and not a.is_one_of((3, 2), [(3,), (2, 3)])
    for value, shape in ((None, ()), (4, ()), ([1, 2], (2,)), ([[1, 2, 3]], (1, 3)), (np.zeros((2, 3)), (2, 3)),
                         (torch.zeros(4), (4,)), ([], (0,)), ([[]], (1, 0))):  # fmt: skip
        assert a.shape_of(value) == shape


@pytest.mark.parametrize(
    "of_budgets, of_lengths, found",
    [
        ((), (), (1, 6)), ((6,), (), (1, 6)), ((3,), (), (2, 3)), ((2, 3), (), (2, 3)), ((), (2, 3), (2, 3)),
        ((), (2,), (2, 3)), ((3,), (2,), (2, 3)), ((6, 1), (2, 3), (2, 3)), ((2, 3), (6,), (2, 3)),
        ((4,), (), None), ((), (4,), None), ((3, 3), (), None), ((), (0,), None), ((0,), (), None),
    ],
)  # fmt: skip
def test_heads_of_six_ragged_rows(of_budgets: tuple, of_lengths: tuple, found: tuple | None) -> None:
    if found is not None:
        assert a.ragged_heads(6, of_budgets, of_lengths) == found
        return
    message = wrong(a.ragged_heads, 6, of_budgets, of_lengths)
    words = r"cu_seqlens of shape \[B \* H \+ 1\] = \[(\d+)\], got \[7\], with budgets of .* and lengths of .*"
    found = re.search(words, message)
    assert found and int(found[1]) != 7, message


def test_no_ragged_rows() -> None:
    assert a.ragged_heads(0, (), ()) == (0, 0) and a.ragged_heads(0, (3,), ()) == (0, 3)
    assert a.ragged_heads(0, (), (0,)) == (0, 0)


def test_offsets_are_clamped_to_the_rows_there_are() -> None:
    assert a.ragged_limits([0, 4, 4, 9], 9) == [4, 0, 5]
    assert a.ragged_limits([-5, 10, 10, MOST], 50) == [10, 0, 40]
    assert a.ragged_limits([50, 40, 45, 20], 50) == [0, 5, 0] and a.ragged_limits([60, 70], 50) == [0]
