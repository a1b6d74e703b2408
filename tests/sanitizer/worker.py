"""pytest with the sanitized builds of both extensions: `python worker.py FOLDER arguments...`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def main(folder: Path, arguments: list[str]) -> int:
    os.environ["LKV_LIBRARY"] = str(folder / "csrc" / "torch" / "_torch.so")
    import lkv_ext

    (path,) = (folder / "csrc" / "python").glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("lkv_ext._C", path)
    sys.modules["lkv_ext._C"] = lkv_ext._C = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lkv_ext._C)

    import pytest

    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
