from __future__ import annotations

from pathlib import Path

import pytest
from harness import build


@pytest.fixture(scope="session")
def sanitized() -> Path:
    """The build folder of emulator, kernels and planted bugs, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if tool := build.missing_tool():
        pytest.skip(f"the emulator is built with {tool}, which is not installed")
    return build.build("sanitized", "all", sanitize=True)


@pytest.fixture(scope="session")
def weak() -> Path:
    """The build folder of the same where plain loads may return old values."""
    if tool := build.missing_tool():
        pytest.skip(f"the emulator is built with {tool}, which is not installed")
    return build.build("weak", "all", weak=True)
