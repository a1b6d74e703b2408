"""Imports point down, as docs/architecture.md has them: each table lists what a package or folder imports, top first.

Imports inside functions count as well, so that none hides a circle.
"""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
ROW = re.compile(r"^\| `([\w./]+)` \|.*\|([^|]*)\|$", re.MULTILINE)
SOURCES = {"lkv_ext": ROOT / "lkv_ext", "lkv": ROOT / "python" / "lkv", "bench": ROOT / "bench"}


def documented(section: str) -> dict[str, set[str]]:
    """Package or folder -> what it imports, in the order of the table."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return {name: set(re.findall(r"`([\w./]+)`", imports)) for name, imports in ROW.findall(text)}


def modules_of(package: str) -> dict[str, Path]:
    folder = SOURCES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = {name: path for package in SOURCES for name, path in modules_of(package).items()}


def imports_of(path: Path) -> set[str]:
    """Modules of the repository that a file imports; what only type checkers read is left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"{path}: imports are absolute"
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    if path.parent == SOURCES["bench"]:  # scripts that import each other by their bare names
        found = {f"bench.{name.split('.')[0]}" if f"bench.{name.split('.')[0]}" in MODULES else name for name in found}
    return {known for name in found if (known := module_named(name))}


def module_named(name: str) -> str | None:
    """The module that `import name` or `from module import name` reads."""
    if name in MODULES:
        return name
    parent = name.rpartition(".")[0]
    compiled = name == "lkv_ext._C"
    return parent if parent in MODULES and not compiled else None


GRAPH = {name: imports_of(path) - {name} for name, path in MODULES.items()}


def package_of(module: str, depth: int = 2) -> str:
    return ".".join(module.split(".")[:depth])


def arrows(package: str) -> dict[str, set[str]]:
    """Subpackage or module at the top of a package -> what it imports of the others there, and of other libraries."""
    found: dict[str, set[str]] = {}
    inside, depth = f"{package}.", package.count(".") + 2
    for module, imports in GRAPH.items():
        if module == package or module.startswith(inside):
            name = package_of(module, depth)
            siblings = {package_of(other, depth) for other in imports if f"{other}.".startswith(inside)}
            libraries = {other.split(".")[0] for other in imports} - {package.split(".")[0]}
            found.setdefault(name, set()).update(siblings - {name}, libraries if depth == 2 else ())
    return found


def check(table: dict[str, set[str]], found: dict[str, set[str]]) -> None:
    """The table is what there is, and every import points to a row further down or out of it."""
    assert table == found
    order = list(table)
    for name, imports in table.items():
        upward = [other for other in imports if other in order and order.index(other) <= order.index(name)]
        assert not upward, f"{name} imports upwards: {upward}"


def test_no_circle_among_modules() -> None:
    TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize("package", ["lkv", "lkv.hf", "lkv_ext"])
def test_packages_import_downwards(package: str) -> None:
    check(documented(package), arrows(package))


def test_folders_of_csrc_include_downwards() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cuh", ".cpp", ".cu", ".in"):
            continue
        folder = path.relative_to(ROOT / "csrc").parts[0]
        names = re.findall(r'^#include "(\w+)/', path.read_text(), re.MULTILINE)
        others = {"include" if name == "lkv" else name for name in names}
        found.setdefault(folder, set()).update(others - {folder, "emulator"})
    check(documented("csrc"), found)


def test_what_needs_no_torch_imports_none() -> None:
    """`import lkv_ext.numpy` works where torch is not installed."""
    reached, todo = set(), ["lkv_ext.numpy"]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += GRAPH[module] - {"lkv_ext"}  # whose names are loaded when they are used
    texts = {module: MODULES[module].read_text() for module in reached}
    assert not [module for module, text in texts.items() if re.search(r"^(import|from) torch\b", text, re.MULTILINE)]


@pytest.mark.parametrize("line", ["from lkv.learn import Trainer", "def f():\n    import lkv.hf.cache"])
def test_an_upward_import_is_found(line: str, tmp_path: Path) -> None:
    path = tmp_path / "snapkv.py"
    path.write_text(line)
    found = {package_of(module) for module in imports_of(path)}
    assert found & {"lkv.learn", "lkv.hf"}
    with pytest.raises(AssertionError):
        check(documented("lkv"), {**arrows("lkv"), "lkv.policies": arrows("lkv")["lkv.policies"] | found})
