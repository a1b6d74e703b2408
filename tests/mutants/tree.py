"""Copies of the working tree that mutants are written into, one for every worker: the tree itself is never touched."""

from __future__ import annotations

import compileall
import contextlib
import os
import py_compile
import shutil
import subprocess
from pathlib import Path

PACKAGES = {"lkv_ext": ".", "lkv": "python"}  # and the folder of the tree that each is imported from


def copy_tree(source: Path, target: Path) -> Path:
    """Everything that git tracks or would, and the built libraries.

    Bytecode goes by the hash of its source: by time and size, that of a mutant could pass for that of the next.
    """
    listed = subprocess.run(
        ("git", "ls-files", "-co", "--exclude-standard", "-z"), cwd=source, check=True, capture_output=True, text=True
    )
    shutil.rmtree(target, ignore_errors=True)
    files = {Path(x) for x in listed.stdout.split("\0") if x}
    for file in sorted(files | {x.relative_to(source) for x in source.glob("lkv_ext/*.so")}):
        if (source / file).is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / file, target / file)
    for package, folder in PACKAGES.items():
        if (target / folder / package).is_dir():
            compileall.compile_dir(
                target / folder / package, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
            )
    return target


@contextlib.contextmanager
def mutated(root: Path, file: str, text: str | None):
    """`file` with other text for the length of the block; as it is where `text` is None."""
    path = root / file
    if text is None:
        yield
        return
    kept = path.read_bytes()
    try:
        path.write_text(text)
        yield
    finally:
        path.write_bytes(kept)


def import_path(root: Path) -> list[str]:
    return [os.fspath((root / folder).resolve()) for folder in PACKAGES.values()]
