"""docs/policies.md has the numbers of the reports beside it, and a row for every method."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from lkv.policies.catalog import CATALOG

ROOT = Path(__file__).parents[1]
REPORTS, PAGE = ROOT / "docs" / "policies", ROOT / "docs" / "policies.md"


def written(reports: Path, into: Path) -> str:
    page = Path(shutil.copy(PAGE, into))
    command = [sys.executable, ROOT / "bench" / "policy_accuracy.py", reports, "--page", page]
    subprocess.run(command, check=True, capture_output=True)
    return page.read_text()


def test_the_table_is_that_of_the_report(tmp_path: Path) -> None:
    assert written(REPORTS, tmp_path) == PAGE.read_text()


def test_another_number_in_the_report_is_another_one_on_the_page(tmp_path: Path) -> None:
    report = json.loads((REPORTS / "report.json").read_text())
    (row,) = (row for row in report["rows"] if (row["method"], row["retention"]) == ("tova", 0.1))
    row["score"] = 0.99
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert "| 99.0 |" in next(line for line in written(tmp_path, tmp_path).splitlines() if "| `tova` | [" in line)


def test_every_method_has_a_row_with_what_it_kept() -> None:
    rows = json.loads((REPORTS / "report.json").read_text())["rows"]
    for name in [*CATALOG, "lkv"]:
        mine = [row for row in rows if row["method"] == name]
        assert [row["retention"] for row in mine] == [0.05, 0.1, 0.15, 0.3]
        assert all(abs(row["kept"] - row["retention"]) < 0.001 and row["samples"] == 300 for row in mine), name


def test_reports_name_no_place_of_a_machine() -> None:
    assert not any(place in (REPORTS / "report.json").read_text() for place in ("/home", "/tmp", "/work", "/root"))
