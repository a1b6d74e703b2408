"""`python -m lkv` is the `lkv` command."""

from __future__ import annotations

import sys

from lkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
