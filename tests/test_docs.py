"""The pages: every public name is in the API, every page can be reached, and the code of the quickstart runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lkv_ext

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def members(package: str) -> set[str]:
    """What docs/api.md lists of a package."""
    (names,) = re.findall(rf"^::: {re.escape(package)}\n    options:\n      members: \[(.*)\]", API, re.MULTILINE)
    return set(names.split(", "))


API = (DOCS / "api.md").read_text()


def test_every_public_name_has_its_place_in_the_api():
    lkv, policies = pytest.importorskip("lkv"), pytest.importorskip("lkv.policies")
    assert members("lkv_ext") == set(lkv_ext.__all__)
    assert members("lkv") == set(lkv.__all__)
    assert members("lkv.policies") == set(policies.__all__) - {"NEEDS", "POLICIES", "SCOPES"}


def test_every_page_is_in_the_navigation():
    pages = {path.name for path in DOCS.glob("*.md")}
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    assert pages == set(re.findall(r"([\w-]+\.md)", navigation))
    assert pages - {"index.md"} == set(re.findall(r"\(([\w-]+\.md)\)", (DOCS / "index.md").read_text()))


def test_the_quickstart_runs():
    """What needs a model runs in the tests of examples and of `lkv.compress`."""
    k, v = torch.randn(2, 1, 2, 64, 8)
    scores = torch.rand(1, 2, 64)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.DOTALL)
    blocks = [block for block in blocks if "lkv." not in block]
    assert len(blocks) == 5
    names: dict = {}
    exec(blocks[0], names)
    assert names["out"].k.shape == (3605, 128) and names["out"].cu_seqlens.shape == (9,)
    assert names["out"].lengths.shape == (1, 8) and names["out"].positions.shape == (3605,)

    names = {"torch": torch, "lkv_ext": lkv_ext, "k": k, "v": v, "scores": scores, "budgets": [9, 30]}
    exec(blocks[1], names)
    exec(blocks[2], names | {"shares": torch.tensor([[0.3, 0.7]]), "lengths": [64], "total": 39})
    new = {"k_new": k[:, :, :1], "v_new": v[:, :, :1], "q": torch.randn(1, 4, 1, 8)}
    before, after = blocks[3].split("cache.evict")
    exec(before, cached := names | new)
    cache = cached["cache"]
    kept = int(cache.lengths.sum())
    exec("cache.evict" + after, cached | {"scores": torch.rand(cache.positions.shape), "budgets": [5, 5]})
    assert kept == 9 + 30 + 2 and int(cache.lengths.sum()) == 10
    exec(blocks[4], names | {"k": k.numpy(), "v": v.numpy(), "scores": scores.numpy()})


def test_the_page_of_layouts_runs():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "layouts.md").read_text(), re.DOTALL)
    first, back, beforehand, unordered, per_head, pool, layers, companions = blocks

    def run(block: str) -> lkv_ext.PagedIndex:
        exec(block, names)
        return names["index"]

    index = run(first)
    assert index.free_pages.tolist() == [2, 2] and index.lengths.shape == (2, 4)
    index = run(back)
    assert names["left"].tolist() == [12, 9]
    run(beforehand)
    assert torch.equal(names["kept"].positions, index.positions)
    rows = run(unordered).positions.view(8, 20)
    assert all(row.unique().numel() == 20 for row in rows) and not torch.equal(rows, rows.sort(1).values)
    assert run(per_head).free_pages[0].tolist() == [3, 0, 2, 3]
    assert names["kernel_k"].shape == (256, 16, 1, 32) and names["kernel_tables"].shape == (8, 4)
    run(pool)
    assert names["first"].pages == 7 + 19 + 2 + 32 and names["allocator"].free == 512 - 60
    assert names["out"].shape == (1, 8, 1, 64)
    index = run(layers)
    assert index.lengths.shape == (3, 2, 4) and index.free_pages.tolist() == [2, 1]
    index = run(companions)
    assert index.companion_free_pages[0].tolist() == [0, 0]
    assert int(index.retained_bytes) == 160 * (64 + 64 + 4) and int(index.reclaimable_bytes) == 4 * 16 * 4 * 128


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs")
def test_pages_build_without_a_warning(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "api.html").read_text()
    missing = [name for name in (*members("lkv_ext"), *members("lkv.policies")) if f".{name}" not in text]
    assert not missing


def test_version():
    assert lkv_ext.__version__ == lkv_ext.build_info()["version"]
    assert f'version = "{lkv_ext.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {lkv_ext.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {lkv_ext.__version__}" in (ROOT / "CHANGELOG.md").read_text()
