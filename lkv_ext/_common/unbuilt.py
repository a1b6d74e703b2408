"""What to say where a library of the package is missing."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def missing(library: str, reason: str) -> ImportError:
    """Of a library that should lie in the package.

    Args:
        reason: why it can be missing, and what to do, where the package was built.
    """
    if (PACKAGE.parent / "csrc").exists():  # in a clone
        reason = (
            "these are the sources, which Python finds before the package where it runs in their folder: run it "
            f"elsewhere, or build them in place: pip install --no-build-isolation -e {PACKAGE.parent}"
        )
    return ImportError(f"lkv_ext: expected {library} in {PACKAGE}, got none: {reason}")
