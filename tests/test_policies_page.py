"""docs/policies.md has the numbers of the reports beside it, and a row for every method."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lkv.policies.catalog import CATALOG

ROOT = Path(__file__).parents[1]
REPORTS, PAGE = ROOT / "docs" / "policies", ROOT / "docs" / "policies.md"
RETRIEVER, SMOLLM2 = REPORTS / "report.json", REPORTS / "smollm2" / "report.json"


def written(reports: Path, into: Path) -> str:
    page = Path(shutil.copy(PAGE, into))
    command = [sys.executable, ROOT / "bench" / "policy_accuracy.py", reports, "--page", page]
    subprocess.run(command, check=True, capture_output=True)
    return page.read_text()


def rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def test_the_tables_are_those_of_the_reports(tmp_path: Path) -> None:
    assert written(REPORTS, tmp_path) == PAGE.read_text()


@pytest.mark.parametrize("path", [RETRIEVER, SMOLLM2], ids=["retriever", "smollm2"])
def test_another_number_in_a_report_is_another_one_on_the_page(path: Path, tmp_path: Path) -> None:
    """A report alone leaves the other table as it is."""
    report = json.loads(path.read_text())
    (row,) = (row for row in report["rows"] if (row["method"], row["retention"]) == ("tova", 0.1))
    if path == RETRIEVER:
        row["score"], shown = 0.99, "| 99.0 |"
    else:
        row["facts"]["exact"][0], shown = 0.99, "| 0.99, "
    copy = tmp_path / path.relative_to(REPORTS)
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(json.dumps(report))
    lines = written(tmp_path, tmp_path).splitlines()
    changed = [line for line in lines if line not in PAGE.read_text().splitlines()]
    assert len(changed) == 1 and "| `tova` | [" in changed[0] and shown in changed[0]


@pytest.mark.parametrize("path", [RETRIEVER, SMOLLM2], ids=["retriever", "smollm2"])
def test_every_method_has_a_row_with_what_it_kept(path: Path) -> None:
    """All on the same texts, at four retentions."""
    found = rows(path)
    texts = {row.get("samples", row.get("passages")) for row in found}
    assert len(texts) == 1
    for name in [*CATALOG, "lkv"]:
        mine = [row for row in found if row["method"] == name]
        assert [row["retention"] for row in mine] == [0.05, 0.1, 0.15, 0.3]
        assert all(abs(row["kept"] - row["retention"]) < 0.001 for row in mine), name


def test_reports_name_no_place_of_a_machine() -> None:
    for path in (RETRIEVER, SMOLLM2):
        assert not any(place in path.read_text() for place in ("/home", "/tmp", "/work", "/root"))
