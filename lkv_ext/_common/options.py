"""The checks of arguments that the torch ops and the NumPy front end share. Imports neither torch nor NumPy."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, overload

from lkv_ext._common.kinds import described
from lkv_ext._common.sizes import Segments

Shapes = Sequence[tuple[int, ...]]
MOST = 2**31 - 1  # rows and positions are int32


class Options(NamedTuple):
    """The protected rows and the layout of the output: keyword arguments that select, evict and evict_ share."""

    sink: int
    window: int
    layout: str
    capacity: int | None
    max_budget: int | None
    reserve: int
    align: int
    back: int = 0  # 0: in place, to the front; else to the back, and what is dropped is a multiple of so many rows
    any_order: bool = False  # in place: rows that lie where kept rows go stay there


def index(value: Any) -> int:
    """`operator.index`, but a symbolic size stays symbolic, where torch would make it the number of this trace."""
    return value if type(value).__name__ == "SymInt" else operator.index(value)


def integer(value: Any, name: str) -> int:
    """An int, or a NumPy scalar or tensor of one; a bool is refused, as it was most likely meant for another one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"expected {name} as an int, got {described(value)}") from None


def whole(value: object, name: str, *, least: int = 0) -> int:
    """A count of rows, heads or tokens, which are int32."""
    count = integer(value, name)
    if not least <= count <= MOST:
        raise ValueError(f"expected {name} in [{least}, 2**31 - 1], got {count}")
    return count


def check_options(options: Options) -> Options:
    """The options as ints, bounds of rows cut to 64 bits. Raises ValueError or TypeError for a wrong one."""
    layout = options.layout
    sink, window, reserve, align = (integer(getattr(options, x), x) for x in ("sink", "window", "reserve", "align"))
    capacity, max_budget = (
        None if value is None else integer(value, name)
        for value, name in ((options.capacity, "capacity"), (options.max_budget, "max_budget"))
    )
    if not isinstance(layout, str) or layout not in ("packed", "padded"):
        raise ValueError(f"expected layout 'packed' or 'padded', got {described(layout)}")
    if sink < 0 or window < 0 or reserve < 0 or align < 1:
        raise ValueError(
            f"expected sink, window and reserve >= 0 and align >= 1, got {sink}, {window}, {reserve} and {align}"
        )
    if align > MOST:
        raise ValueError(f"expected align of at most 2**31 - 1, got {align}")
    if reserve > MOST:
        raise ValueError(f"expected at most 2**31 - 1 rows in the output, got a reserve of {reserve}")
    bounds = bounded(capacity), bounded(max_budget)
    return Options(bounded(sink), bounded(window), layout, *bounds, reserve, align, options.back, options.any_order)


def back_of(to: object, page: object) -> int:
    """`Options.back` of `to` and `page`; raises ValueError or TypeError for wrong ones."""
    if not isinstance(to, str) or to not in ("front", "back"):
        raise ValueError(f"expected to 'front' or 'back', got {described(to)}")
    rows = whole(page, "page", least=1)
    if to == "front" and rows != 1:
        raise ValueError(f"expected page with to='back', which drops whole pages, got {rows} with to='front'")
    return rows if to == "back" else 0


def whole_pages(page: object) -> int:
    """`Options.back` of a select: only what is dropped together, as nothing moves."""
    rows = whole(page, "page", least=1)
    return rows if rows > 1 else 0


def any_order_of(order: object) -> bool:
    """`Options.any_order` of `order`; raises ValueError for a wrong one."""
    if not isinstance(order, str) or order not in ("ascending", "any"):
        raise ValueError(f"expected order 'ascending' or 'any', got {described(order)}")
    return order == "any"


@overload
def bounded(value: int) -> int: ...
@overload
def bounded(value: int | None) -> int | None: ...
def bounded(value: int | None) -> int | None:
    """Cut to 64 bits, which no number of rows exceeds."""
    if value is None or -(2**63) <= value < 2**63:
        return value
    return 2**63 - 1 if value > 0 else -(2**63)


def integer_shapes(segments: Segments) -> tuple[Shapes, Shapes]:
    """The shapes that budgets, and that lengths and starts, may have."""
    layers, batch, heads = segments.layers, segments.batch, segments.heads
    if segments.stacked:
        return [(layers, heads), (layers, batch, heads)], [(batch,), (batch, heads), (layers, batch, heads)]
    return [(heads,), (batch, heads)], [(batch,), (batch, heads)]


def flatten(values: Any, name: str, *, trusted: bool = False) -> tuple[list[int], tuple[int, ...]]:
    """Integers of nested sequences or a NumPy array, and their shape. `trusted`: not checked, as a tracer's."""
    if hasattr(values, "ravel"):  # NumPy
        if "bool" in str(values.dtype):
            raise TypeError(f"expected {name} of integers, got {values.dtype}")
        return flatten(values.ravel().tolist(), name, trusted=trusted)[0], tuple(values.shape)
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        raise TypeError(f"expected {name} as an int, a sequence of ints or a tensor, got {described(values)}")
    if len(values) == 0 or isinstance(values[0], int) or not hasattr(values[0], "__len__"):
        if trusted:
            return list(values), (len(values),)
        try:
            return list(map(index, values)), (len(values),)
        except TypeError:
            raise TypeError(f"expected {name} of integers, got {described(values)}") from None
    parts = [flatten(row, name, trusted=trusted) for row in values]
    if any(shape != parts[0][1] for _, shape in parts):
        raise ValueError(f"expected {name} with rows of one length, got lengths {[len(flat) for flat, _ in parts]}")
    return [x for flat, _ in parts for x in flat], (len(parts), *parts[0][1])


def host_ints(values: Any, name: str, shapes: Shapes, *, trusted: bool = False) -> Sequence[int]:
    """Integers on the host as a flat list, of one of these shapes or one for all."""
    if isinstance(values, int):
        return (bounded(integer(values, name)),)
    flat, shape = flatten(values, name, trusted=trusted)
    if not is_one_of(shape, shapes) and shape not in ((), (1,)):
        raise wrong_shape(name, shapes, shape)
    if not trusted and flat and not -(2**63) <= min(flat) <= max(flat) < 2**63:
        return list(map(bounded, flat))
    return flat


def is_one_of(shape: Sequence[int], shapes: Shapes) -> bool:
    """`shape in shapes`, in a form in which torch.compile compares symbolic sizes with numbers."""
    return shape in shapes or any(
        [len(shape) == len(other) and all([a == b for a, b in zip(shape, other, strict=True)]) for other in shapes]
    )


def wrong_shape(name: str, shapes: Sequence[Sequence[int]], got: Sequence[int]) -> ValueError:
    form = {1: "[H]", 2: "[B, H]", 3: "[N, B, H]"} if name == "budgets" else {1: "[B]", 2: "[B, H]", 3: "[N, B, H]"}
    if name == "budgets" and len(shapes[-1]) == 3:
        form[2] = "[N, H]"
    expected = " or ".join([f"{form[len(shape)]} = {list(shape)}" for shape in shapes])
    return ValueError(f"expected {name} of shape {expected}, got {list(got)}")


def shape_of(values: Any) -> tuple[int, ...]:
    """The shape of integers of the caller: of a tensor, an array, nested sequences, one int or None."""
    if values is None or isinstance(values, int):
        return ()
    if hasattr(values, "shape"):
        return tuple(values.shape)
    if not hasattr(values, "__len__"):  # an integer in the form of a tracer
        return ()
    nested = len(values) > 0 and not isinstance(values[0], int) and hasattr(values[0], "__len__")
    return (len(values), len(values[0])) if nested else (len(values),)


def ragged_heads(count: int, of_budgets: tuple[int, ...], of_lengths: tuple[int, ...]) -> tuple[int, int]:
    """B and H of ragged rows, which have none of their own: from the shapes of budgets and lengths, otherwise B = 1."""
    if len(of_lengths) == 2 or len(of_budgets) == 2:
        batch, heads = of_lengths if len(of_lengths) == 2 else of_budgets
    elif of_lengths:
        batch, heads = of_lengths[0], count // max(of_lengths[0], 1)
    else:
        heads = of_budgets[0] if of_budgets else count
        batch = count // max(heads, 1)
    if batch * heads != count:
        raise ValueError(
            f"expected cu_seqlens of shape [B * H + 1] = [{batch * heads + 1}], got [{count + 1}], with budgets of "
            f"{list(of_budgets)} and lengths of {list(of_lengths)}"
        )
    return batch, heads


def ragged_limits(offsets: Sequence[int], tokens: int) -> list[int]:
    """How long each ragged segment can be; offsets are clamped to the tokens there are, as in the kernels."""
    begins = [max(0, min(x, tokens)) for x in offsets]
    return [max(0, end - begin) for begin, end in pairwise(begins)]
