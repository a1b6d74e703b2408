"""Profiles of hypothesis, the device that parity runs on (`pytest -m cuda` is the same suite on a GPU), and a line for
CPU kernels that this machine lacks the instructions of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from invariants import watched

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine with a GPU and little else: bench/gpu.py leaves the files out that need it
    pass
else:
    settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None, database=None)
    settings.register_profile(
        "fuzz", max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
    settings.register_profile("small", max_examples=25, derandomize=True, deadline=None, database=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """No emulator that Debian has runs AVX-512 (qemu's knows AVX2 at most), so that only a machine can."""
    reasons = [str(x.longrepr[-1]) for x in terminalreporter.stats.get("skipped", ()) if isinstance(x.longrepr, tuple)]
    lacking = sorted({x.rsplit(" ", 1)[-1] for x in reasons if "this machine does not run " in x})
    if lacking:
        terminalreporter.section("instruction sets", sep="=", yellow=True)
        terminalreporter.write_line(
            f"NOT TESTED: CPU kernels for {' and '.join(lacking)}, which this machine does not run"
        )


@pytest.fixture(scope="session", autouse=True)
def _caches_are_watched() -> Iterator[None]:
    """The bookkeeping of every RaggedCache is checked after every step, whatever the test is about."""
    with watched():
        yield
