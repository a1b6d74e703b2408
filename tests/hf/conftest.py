"""The models here are tiny: one thread is faster than two, and does not wait for other work on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [] if find_spec("transformers") else ["test_*.py"]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _invariants(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every cache of every test is looked at behind each of its steps."""
    from cache_invariants import check_always, check_routes

    check_always(monkeypatch)
    yield
    check_routes()
