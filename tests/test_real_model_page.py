"""docs/real-model.md and the README's first table have the numbers of the reports beside the page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "docs" / "real-model"


def write(reports: Path, into: Path) -> tuple[str, str]:
    """Page and README with the tables of these reports."""
    page, readme = shutil.copy(ROOT / "docs" / "real-model.md", into), shutil.copy(ROOT / "README.md", into)
    command = [sys.executable, ROOT / "bench" / "real_model.py", reports, "--page", page, "--readme", readme]
    subprocess.run(command, check=True, capture_output=True)
    return Path(page).read_text(), Path(readme).read_text()


def test_all_tables_are_those_of_the_reports(tmp_path: Path) -> None:
    page, readme = write(REPORTS, tmp_path)
    assert page == (ROOT / "docs" / "real-model.md").read_text()
    assert readme == (ROOT / "README.md").read_text()


def test_another_number_in_a_report_is_another_one_on_the_pages(tmp_path: Path) -> None:
    reports = Path(shutil.copytree(REPORTS, tmp_path / "reports"))
    report = json.loads((reports / "report.json").read_text())
    for row in report["rows"]:
        if (row["domain"], row["method"], row["retention"]) == ("all", "lkv", 0.15):
            row["facts"]["exact"][0] = 0.99
    (reports / "report.json").write_text(json.dumps(report))
    page, readme = write(reports, tmp_path)
    assert "| 15 % | **LKV** | 0.99 |" in page and "| 15 % | 0.99 (" in readme
