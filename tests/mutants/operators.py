"""Careless mistakes that cosmic-ray has no operator for: each puts other code in the place of a node of the tree."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator

import parso
from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Name, Number, PythonNode
from parso.tree import BaseNode, NodeOrLeaf

# Methods whose result a careless caller takes for granted: without the call, the rest still runs.
METHODS = frozenset(
    (
        "abs",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "clone",
        "contiguous",
        "copy",
        "detach",
        "double",
        "float",
        "int",
    )
    + ("long", "lower", "masked_fill", "max", "min", "mean", "round", "sort", "softmax", "sqrt", "strip", "sum", "to")
)
FUNCTIONS = frozenset(("abs", "deepcopy", "max", "min", "reversed", "round", "sorted"))
# Calls whose arguments may come in any order, or whose swapped arguments fail at the first use.
SYMMETRIC = frozenset(
    (
        "max",
        "min",
        "equal",
        "allclose",
        "isinstance",
        "issubclass",
        "hasattr",
        "getattr",
        "setattr",
        "zip",
        "gcd",
        "lcm",
    )
)
# Keywords without which a caller sees no difference here: devices where there is one, texts, checks of the code itself.
SILENT_KEYWORDS = frozenset(
    ("help", "description", "metavar", "prog", "epilog", "stacklevel", "device", "strict", "non_blocking", "encoding")
    + ("desc", "unit", "leave", "flush")
)
BOUND_CALLS = frozenset(("range", "narrow", "arange"))


class Replacement(Operator):
    """An operator that says what stands in a node's place: `codes(node)`, one mutant each."""

    @abstractmethod
    def codes(self, node: NodeOrLeaf) -> Iterator[str]: ...

    def mutation_positions(self, node: NodeOrLeaf) -> Iterable[tuple]:
        return ((node.start_pos, node.end_pos) for _ in self.codes(node))

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        return parso.parse(node.get_first_leaf().prefix + list(self.codes(node))[index])


def trailers(node: NodeOrLeaf, kind: str) -> bool:
    return isinstance(node, PythonNode) and node.type == "trailer" and node.children[0].value == kind


def called_name(node: BaseNode) -> str | None:
    """The last name before the parentheses of a call's trailer `node`."""
    before = node.get_previous_sibling()
    if isinstance(before, Name):
        return before.value
    return before.children[-1].value if before is not None and trailers(before, ".") else None


def arguments(trailer: BaseNode) -> list[NodeOrLeaf]:
    inside = trailer.children[1:-1]
    if len(inside) == 1 and inside[0].type == "arglist":
        inside = inside[0].children
    return [x for x in inside if getattr(x, "value", None) != ","]


def bare(node: NodeOrLeaf) -> str:
    return node.get_code(include_prefix=False)


def is_named(argument: NodeOrLeaf) -> bool:
    return argument.type == "argument" and argument.children[1:2] and bare(argument.children[1]) == "="


def is_plain(argument: NodeOrLeaf) -> bool:
    """A name, an attribute or an item: what is easily taken for its neighbour."""
    return isinstance(argument, Name) or (
        argument.type in ("atom_expr", "power") and not any(trailers(x, "(") for x in argument.children[1:])
    )


class DropCall(Replacement):
    """`x.clamp(0, n)` becomes `x`, `max(a, b)` becomes `a` or `b`, `sorted(x)` becomes `x`.

    Moves to a device stay, as do the keywords that name one: where there is one device, nothing can tell."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if not isinstance(node, PythonNode) or node.type not in ("atom_expr", "power"):
            return
        parts = node.children
        for i in range(1, len(parts) - 1):
            if trailers(parts[i], ".") and trailers(parts[i + 1], "(") and parts[i].children[1].value in METHODS:
                if parts[i].children[1].value == "to" and "device" in parts[i + 1].get_code():
                    continue
                kept = [bare(x) if n == 0 else x.get_code() for n, x in enumerate(parts) if n not in (i, i + 1)]
                yield "".join(kept)
        if isinstance(parts[0], Name) and parts[0].value in FUNCTIONS and trailers(parts[1], "("):
            rest = "".join(x.get_code() for x in parts[2:])
            given = [x for x in arguments(parts[1]) if x.type != "argument"]
            if len(given) > 1 or parts[0].value not in ("max", "min"):
                for each in given[:2] if parts[0].value in ("max", "min") else given[:1]:
                    yield f"({bare(each)}){rest}"

    @classmethod
    def examples(cls):
        return (Example("y = x.clamp(0, n).sum()", "y = x.sum()"), Example("y = max(a, b)", "y = (a)"))


class SwapArguments(Replacement):
    """`f(sink, window)` becomes `f(window, sink)`, and so do the values of two keywords beside each other."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if not trailers(node, "(") or called_name(node) in SYMMETRIC:
            return
        given = arguments(node)
        for i in range(len(given) - 1):
            first, second = given[i], given[i + 1]
            texts = [bare(x) for x in given]
            if is_named(first) and is_named(second) and is_plain(first.children[2]) and is_plain(second.children[2]):
                one, two = bare(first.children[2]), bare(second.children[2])
                texts[i], texts[i + 1] = f"{bare(first.children[0])}={two}", f"{bare(second.children[0])}={one}"
            elif is_plain(first) and is_plain(second):
                one, two = texts[i], texts[i + 1]
                texts[i], texts[i + 1] = two, one
            else:
                continue
            if one != two:
                yield f"({', '.join(texts)})"

    @classmethod
    def examples(cls):
        return (Example("f(sink, window)", "f(window, sink)"), Example("f(a=x, b=y)", "f(a=y, b=x)"))


class DropKeyword(Replacement):
    """`f(x, lengths=n)` becomes `f(x)`: the argument is forgotten."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if trailers(node, "("):
            given = arguments(node)
            for dropped in given:
                if is_named(dropped) and bare(dropped.children[0]) not in SILENT_KEYWORDS:
                    yield f"({', '.join(bare(x) for x in given if x is not dropped)})"

    @classmethod
    def examples(cls):
        return (Example("f(x, lengths=n)", "f(x)"),)


class DropGuard(Replacement):
    """`if x: raise ...` and early returns are forgotten; an `elif` or `else` behind them too."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if node.type != "if_stmt":
            return
        body = node.children[3]
        statements = [x for x in body.children if x.type not in ("newline",)] if body.type == "suite" else [body]
        if len(statements) == 1 and statements[0].type == "simple_stmt":
            first = statements[0].children[0]
            if first.type in ("raise_stmt", "return_stmt") or bare(first) in ("return", "continue", "break"):
                rest = node.children[4:]
                if not rest:
                    yield "pass\n"
                elif len(rest) == 3 and bare(rest[0]) == "else":
                    yield "if True:" + rest[2].get_code()

    @classmethod
    def examples(cls):
        return (Example("if x:\n    raise ValueError\n", "pass\n"),)


class DropStatement(Replacement):
    """A call for its effect, or an assignment to an attribute or an item, is forgotten."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if node.parent is None or node.parent.type != "simple_stmt":
            return
        is_call = node.type in ("atom_expr", "power") and trailers(node.children[-1], "(")
        if node.type == "expr_stmt":
            target = node.children[0]
            is_item = target.type in ("atom_expr", "power")
            is_sum = len(node.children) == 3 and bare(node.children[1]) not in ("=", ":") and target.type == "name"
            if is_item or is_sum:
                yield "pass"
        elif is_call:
            yield "pass"

    @classmethod
    def examples(cls):
        return (Example("self.held = 0\n", "pass\n"), Example("rows.append(x)\n", "pass\n"))


_NO_BOUNDS = ("operator", "sliceop", "argument", "string", "keyword", "arglist", "factor")


class ShiftBound(Replacement):
    """A bound of a slice or of a range is off by one. Numbers are cosmic-ray's."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if self._is_bound(node) and not isinstance(node, Number):
            code = bare(node) if isinstance(node, Name) else f"({bare(node)})"
            yield from (f"{code} + 1", f"{code} - 1")

    def _is_bound(self, node: NodeOrLeaf) -> bool:
        parent = node.parent
        if parent is None or node.type in _NO_BOUNDS:
            return False
        if parent.type == "subscript":
            return True
        trailer = parent.parent if parent.type == "arglist" else parent
        return trailer is not None and trailers(trailer, "(") and called_name(trailer) in BOUND_CALLS

    @classmethod
    def examples(cls):
        return (Example("x[:n]", "x[:n + 1]"), Example("range(n)", "range(n - 1)", 1))


OPERATORS = {
    "call": DropCall,
    "arguments": SwapArguments,
    "keyword": DropKeyword,
    "guard": DropGuard,
    "statement": DropStatement,
    "bound": ShiftBound,
}
