"""`python -m` of every module that is a command: it does what its `main` does, and ends with its code."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import lkv
import lkv_ext

pytest.importorskip("transformers")

ROOTS = {"lkv": Path(lkv.__file__).parent, "lkv_ext": Path(lkv_ext.__file__).parent}
# Arguments, the code that it ends with, and what it prints.
COMMANDS = {
    "lkv/__main__.py": (["policies", "--help"], 0, "usage"),
    "lkv/demo/__main__.py": (["--tokens=1"], 2, "expected at least 128 tokens, got 1"),
    "lkv/golden.py": (["--help"], 0, "usage"),
    "lkv_ext/__main__.py": ([], None, "version"),
}
ELSEWHERE = {"lkv/tasks/corpora.py"}  # test_corpora
MAKERS = {"lkv/ship.py", "lkv/retriever/train.py"}  # made what comes with the package; run for hours


def test_no_command_is_left_out() -> None:
    found = {
        f"{name}/{path.relative_to(root).as_posix()}"
        for name, root in ROOTS.items()
        for path in root.rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert found == COMMANDS.keys() | ELSEWHERE | MAKERS


@pytest.mark.parametrize("name", COMMANDS)
def test_a_module_is_a_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments, code, words = COMMANDS[name]
    package, rest = name.split("/", 1)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    ended = None
    try:
        runpy.run_path(str(ROOTS[package] / rest), run_name="__main__")
    except SystemExit as stopped:
        ended = stopped.code
    printed = capsys.readouterr()
    assert ended == code and words in printed.out + printed.err
