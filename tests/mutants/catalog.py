"""Which mutants there are: every place of the sources where one of the operators makes a mistake that says something.

A mutant's key is made of its file, the function, and the lines before and after, so that it stays what it is while
other lines change. Samples go by a hash of key and seed: a change to one line leaves the rest of a sample alone.
"""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider
from parso.tree import NodeOrLeaf

from . import operators

# Areas in the order of their lines below: the first that fits has the file. With each, its part of a sample.
AREAS = {
    "policies": (50, ("python/lkv/policies/*", "python/lkv/reference/*", "lkv_ext/_torch/budgets.py")),
    "hf": (90, ("python/lkv/hf/*",)),
    "learn": (55, ("python/lkv/learn/*",)),
    "evaluate": (50, ("python/lkv/evaluate/*",)),
    "tasks": (40, ("python/lkv/tasks/*",)),
    "ops": (80, ("lkv_ext/*",)),
    "cli": (25, ("python/lkv/*",)),
}

# Left out, with the reason why a mutant says nothing there.
SILENT_FILES = {
    "python/lkv/evaluate/plots.py": "drawings: where a line is drawn is looked at, not tested",
    "python/lkv/retriever/train.py": "made the weights that come with the package, which are tested; runs for hours",
    "python/lkv/ship.py": "as train.py",
    **{
        f"python/lkv/press/{name}.py": "runs with kvpress and its older transformers alone: make test-kvpress"
        for name in ("__init__", "compact", "layer", "pipeline", "policy")
    },
    **{
        f"python/lkv/vllm/{name}.py": "runs with vLLM alone, in its own environment: make test-vllm"
        for name in (
            "__init__",
            "attention",
            "backends",
            "cpu",
            "flash_attn",
            "flashinfer",
            "gpu",
            "install",
            "layers",
            "metadata",
            "metrics",
            "refusals",
            "requests",
            "spec",
        )
    },
}

_COSMIC_RAY = {
    "comparison": "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is",
    "arithmetic": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd "
    "LShift_RShift RShift_LShift",
    "boolean": "AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd",
    "sign": "Delete_USub Delete_Invert Delete_Not",
    "number": "NumberReplacer",
    "loop": "ZeroIterationForLoop ReplaceBreakWithContinue ReplaceContinueWithBreak",
    "decorator": "RemoveDecorator",
}
_PREFIX = {"comparison": "ReplaceComparisonOperator_", "arithmetic": "ReplaceBinaryOperator_"}
_PREFIX["sign"] = "ReplaceUnaryOperator_"

# Decorators without which something still runs, and wrongly: the others fail at the first call or cache only.
_TELLING_DECORATORS = ("no_grad", "inference_mode")
_MESSAGE_CALLS = frozenset(("warn", "print", "add_argument", "add_parser", "add_argument_group", "TypeVar", "cast"))


@dataclass(frozen=True)
class Mutant:
    file: str
    where: str  # qualified name of the function or class, empty for the module
    before: str
    after: str
    kind: str
    line: int = field(compare=False)
    span: tuple[int, int] = field(compare=False)
    code: str = field(compare=False)
    nth: int = 0  # of mutants that are alike in one function

    @property
    def key(self) -> str:
        return hashlib.sha256(
            "\0".join((self.file, self.where, self.before, self.after, str(self.nth))).encode()
        ).hexdigest()[:12]

    def apply(self, source: str) -> str:
        return source[: self.span[0]] + self.code + source[self.span[1] :]

    def __str__(self) -> str:
        lines = [*(f"- {x}" for x in self.before.splitlines()), *(f"+ {x}" for x in self.after.splitlines())]
        return f"{self.file}:{self.line} in {self.where or 'the module'} [{self.kind}]\n" + textwrap.indent(
            "\n".join(lines), "    "
        )


def all_operators() -> list[tuple[str, Operator]]:
    provider = OperatorProvider()
    theirs = [
        (kind, provider[_PREFIX.get(kind, "") + name]())
        for kind, names in _COSMIC_RAY.items()
        for name in names.split()
    ]
    return theirs + [(kind, operator()) for kind, operator in operators.OPERATORS.items()]


def area_of(file: str) -> str | None:
    if file in SILENT_FILES:
        return None
    return next((area for area, (_, patterns) in AREAS.items() if any(fnmatch(file, x) for x in patterns)), None)


def sources(root: Path) -> list[str]:
    found = [p for top in ("lkv_ext", "python/lkv") for p in sorted((root / top).rglob("*.py"))]
    return [file for p in found if area_of(file := p.relative_to(root).as_posix())]


def mutants(source: str, file: str) -> Iterator[Mutant]:
    """Every mutant of a file. Some may not compile, or be the same program: see `says_something`."""
    tree = parso.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    every = all_operators()
    seen: dict[tuple, int] = defaultdict(int)
    for node in ast_nodes(tree):
        if _is_silent(node):
            continue
        for kind, operator in every:
            for index, _ in enumerate(operator.mutation_positions(node)):
                if kind == "decorator" and not any(x in node.get_code() for x in _TELLING_DECORATORS):
                    continue
                begin, end = (
                    starts[line - 1] + column for line, column in (node.get_start_pos_of_prefix(), node.end_pos)
                )
                code = _mutated(node, operator, index)
                span, code = _shrink(source, (begin, end), code)
                before, after = _lines(source, span, code)
                alike = (_qualified_name(node), before, after)
                seen[alike] += 1
                yield Mutant(file, *alike, kind, source.count("\n", 0, span[0]) + 1, span, code, seen[alike] - 1)


def says_something(mutant: Mutant, source: str) -> bool:
    """Whether the mutated file compiles, and to another program."""
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def sample(root: Path, files: list[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, spread over areas by their parts, and within one over the kinds of mistakes."""
    texts = {file: (root / file).read_text() for file in sorted(files)}
    pools: dict[str, dict[str, list[Mutant]]] = defaultdict(lambda: defaultdict(list))
    for file, source in texts.items():
        for mutant in mutants(source, file):
            pools[area_of(file)][mutant.kind].append(mutant)
    parts = sum(AREAS[area][0] for area in pools)
    chosen: list[Mutant] = []
    for area, kinds in pools.items():
        for pool in kinds.values():
            pool.sort(key=lambda x: _rank(seed, x.key), reverse=True)
        wanted = -(-count * AREAS[area][0] // parts)
        taken: list[Mutant] = []
        while len(taken) < wanted and any(kinds.values()):
            for kind in sorted(kinds, key=lambda x, area=area: _rank(seed, area, x)):
                while kinds[kind]:
                    mutant = kinds[kind].pop()
                    if says_something(mutant, texts[mutant.file]):
                        taken.append(mutant)
                        break
        chosen += taken[:wanted]
    return chosen


def _rank(*words: object) -> bytes:
    return hashlib.sha256(" ".join(map(str, words)).encode()).digest()


def _mutated(node: NodeOrLeaf, operator: Operator, index: int) -> str:
    """The node's code after the mutation. cosmic-ray mutates in place: what it changed is put back."""
    kept = [(x, list(x.children) if hasattr(x, "children") else x.value) for x in ast_nodes(node)]
    result = operator.mutate(node, index)
    code = "" if result is None else result.get_code()
    for each, value in kept:
        if hasattr(each, "children"):
            each.children = value
        else:
            each.value = value
    return code


def _shrink(source: str, span: tuple[int, int], code: str) -> tuple[tuple[int, int], str]:
    """The same change without what is alike at its beginning and its end."""
    begin, end = span
    old = source[begin:end]
    head = next((i for i, (a, b) in enumerate(zip(old, code, strict=False)) if a != b), min(len(old), len(code)))
    old, code = old[head:], code[head:]
    pairs = zip(reversed(old), reversed(code), strict=False)
    tail = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(code)))
    return (begin + head, end - tail), code[: len(code) - tail]


def _lines(source: str, span: tuple[int, int], code: str) -> tuple[str, str]:
    begin = source.rfind("\n", 0, span[0]) + 1
    end = source.find("\n", span[1])
    end = len(source) if end < 0 else end
    after = source[begin : span[0]] + code + source[span[1] : end]
    return tuple(textwrap.dedent(x).strip() for x in (source[begin:end], after))


def _qualified_name(node: NodeOrLeaf) -> str:
    names, scope = [], node
    while scope is not None:
        if scope.type in ("funcdef", "classdef"):
            names.append(scope.name.value)
        scope = scope.parent
    return ".".join(reversed(names))


def _is_silent(node: NodeOrLeaf) -> bool:
    """Annotations, imports, messages, strings and decorators: a mistake there says nothing, or fails at once."""
    if node.type in ("annassign", "tfpdef"):
        return True
    if node.type == "operator" and node.parent.type in ("parameters", "param", "lambdef"):  # *, of keywords alone
        return True
    child, parent = node, node.parent
    while parent is not None:
        kind = parent.type
        if kind in ("raise_stmt", "import_name", "import_from", "decorator", "fstring", "tfpdef", "assert_stmt"):
            return True
        if kind == "annassign" and child is parent.children[1]:
            return True
        if kind == "funcdef" and child is parent.annotation:
            return True
        if kind == "if_stmt" and operators.bare(parent.children[1]).endswith("TYPE_CHECKING"):
            return True
        if kind == "argument" and operators.bare(parent.children[0]) in operators.SILENT_KEYWORDS:
            return True
        if operators.trailers(parent, "(") and operators.called_name(parent) in _MESSAGE_CALLS:
            return True
        child, parent = parent, parent.parent
    return False
