"""Policies by name: those of this package, and those that packages outside add by an entry point."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lkv import policies
from lkv.evaluate import methods
from lkv.policies import Policy
from lkv.policies.base import treats_heads_alike
from lkv.policies.catalog import CATALOG

SOURCE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Newest:
    needs = frozenset()
    scope = "layer"
    sink, window = 1, 2

    def score(self, layer, observation):
        return observation.positions.float()

    def budgets(self, scores, lengths, total, *, starts=None):
        from lkv.policies.uniform import uniform_budgets

        return uniform_budgets(lengths, total)
"""


def install(folder: Path, package: str, entries: str) -> None:
    """What pip would leave of a package: a module and its metadata."""
    (folder / f"{package}.py").write_text(SOURCE)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lkv.policies]\n{entries}\n")


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for package in ("outside_one", "outside_two"):
        sys.modules.pop(package, None)


def test_a_package_outside_is_found(outside: Path) -> None:
    assert policies.names() == list(policies.POLICIES)
    install(outside, "outside_one", "newest = outside_one:Newest")
    assert policies.names() == [*policies.POLICIES, "newest"]
    found = policies.get("newest")
    assert (
        isinstance(found, Policy) and type(found).__module__ == "outside_one" and (found.sink, found.window) == (1, 2)
    )
    assert methods.heuristics()["newest"] == found
    with pytest.raises(ValueError, match="expected one of adakv, .*, newest, .*, got 'newer'"):
        policies.get("newer")


def test_names_of_this_package_stay_its_own(outside: Path) -> None:
    install(outside, "outside_one", "snapkv = outside_one:Newest")
    assert policies.get("snapkv") == policies.SnapKV() and policies.names() == list(policies.POLICIES)


def test_one_name_in_two_packages(outside: Path) -> None:
    install(outside, "outside_one", "newest = outside_one:Newest")
    install(outside, "outside_two", "newest = outside_two:Newest")
    with pytest.raises(
        ValueError, match="one package with a policy 'newest', got outside_one:Newest, outside_two:Newest"
    ):
        policies.get("newest")


def test_what_a_package_outside_adds_is_checked(outside: Path) -> None:
    install(outside, "outside_one", "newest = builtins:object")
    with pytest.raises(TypeError, match="expected a name or a policy, got .* without needs, scope"):
        policies.get("newest")


def test_a_policy_may_need_everything() -> None:
    class Everything(policies.SnapKV):
        needs = policies.NEEDS

    policy = Everything()
    assert policies.get(policy) is policy
    Everything.needs = policies.NEEDS | {"luck"}
    with pytest.raises(ValueError, match=r"needs of all_queries, .*, got 'layer' and \['all_queries', .*'luck'"):
        policies.get(policy)


def test_the_policy_of_a_checkpoint_has_no_bare_name() -> None:
    with pytest.raises(ValueError, match=r"got 'lkv': lkv.load\(path, model\) makes the policy of a checkpoint"):
        policies.get("lkv")


def test_the_table_of_the_docs_is_that_of_the_registry(capsys: pytest.CaptureFixture) -> None:
    from lkv.cli import main

    assert main(["policies", "--markdown"]) == 0
    table = capsys.readouterr().out
    page = (Path(__file__).parents[1] / "docs" / "policies.md").read_text()
    assert f"<!-- the table: lkv policies --markdown -->\n{table}<!-- end of the table -->" in page
    assert table.count("\n") == len(policies.POLICIES) + 2


def test_lkv_policies_prints_what_is_installed(outside: Path, capsys: pytest.CaptureFixture) -> None:
    from lkv.cli import main

    install(outside, "outside_one", "newest = outside_one:Newest")
    assert main(["policies"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith(" ")] == policies.names()
    assert "    needs         all queries\n" in out and "    paper         2509.09754\n" in out
    assert "newest\n    of another package\n" in out


@pytest.mark.parametrize("name", CATALOG)
def test_heads_are_alike_as_the_catalog_says(name: str) -> None:
    policy = policies.get(name)
    equal = CATALOG[name].budgets in ("equal", "layers in equal steps, the first keep most")
    assert treats_heads_alike(policy) == equal
    if CATALOG[name].budgets == "equal":
        assert not treats_heads_alike(policies.AdaKV(policy)) and treats_heads_alike(policies.Protect(policy, sink=1))
