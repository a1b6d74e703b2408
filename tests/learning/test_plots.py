"""What the pictures show: the values, where they are drawn, and which line is which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from lkv.evaluate import plots

ROWS = [
    {"method": "full", "retention": 1.0, "score": 0.9, "low": 0.8, "high": 0.95},
    {"method": "floor", "retention": 0.1, "score": 0.1, "low": 0.05, "high": 0.2},
    {"method": "lkv", "retention": 0.3, "score": 0.8, "low": 0.7, "high": 0.85},
    {"method": "lkv", "retention": 0.1, "score": 0.5, "low": 0.4, "high": 0.55},
    {"method": "snapkv", "retention": 0.1, "score": 0.2, "low": 0.15, "high": 0.3},
]
KEPT = {
    "heads": [{"name": "layer 0, head 0", "positions": [0, 3]}, {"name": "layer 0, head 1", "positions": [1, 2, 8]}],
    "evidence": [[2, 5]],
    "length": 9,
    "title": "one",
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Figure]]:
    """The figures by the names of their files."""
    figures = {}

    def keep(figure: Figure, path: Path) -> Path:
        figures[path.name] = figure
        return path

    monkeypatch.setattr(plots, "_save", keep)
    yield figures
    for figure in figures.values():
        plots.plt.close(figure)


def test_accuracy_over_kept_rows_in_percent(drawn: dict[str, Figure], tmp_path: Path) -> None:
    assert plots.draw({"rows": ROWS}, tmp_path / "new") == [tmp_path / "new" / "accuracy.png"]
    (axes,) = drawn["accuracy.png"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["full", "floor", "lkv", "snapkv"]
    assert lines["lkv"].get_xydata().tolist() == [[10, 50], [30, 80]]  # from left to right
    assert lines["snapkv"].get_xydata().tolist() == [[10, 20]]
    # Those that do not depend on the retention are lines across.
    assert list(lines["full"].get_ydata()) == [90, 90] and list(lines["floor"].get_ydata()) == [10, 10]
    assert lines["full"].get_linestyle() == "--" and lines["floor"].get_linestyle() == ":"
    assert lines["lkv"].get_linewidth() > lines["snapkv"].get_linewidth()
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(map(round, point)) for point in band} == {(10, 40), (10, 55), (30, 70), (30, 85)}
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(lines)


def test_shares_are_drawn_per_layer_and_head(drawn: dict[str, Figure], tmp_path: Path) -> None:
    table = [[0.1, 0.2, 0.7], [0.05, 0.25, 0.6]]
    plots.draw({"rows": ROWS, "shares": {"0.15": table, "0.3": [[1, 1, 1], [0, 0, 0]]}}, tmp_path)
    first, second, _ = drawn["budgets.png"].axes
    assert np.allclose(first.images[0].get_array(), 100 * np.array(table))
    assert first.images[0].get_clim() == (0, 100)
    assert {(text.get_position(), text.get_text()) for text in first.texts} == {
        ((0, 0), "10"), ((1, 0), "20"), ((2, 0), "70"), ((0, 1), "5"), ((1, 1), "25"), ((2, 1), "60"),
    }  # fmt: skip
    assert (first.get_title(), second.get_title()) == ("15 % of all rows", "30 % of all rows")
    assert (first.get_xlabel(), first.get_ylabel()) == ("KV head", "layer")


def test_kept_positions_and_evidence(drawn: dict[str, Figure], tmp_path: Path) -> None:
    plots.draw({"rows": ROWS, "kept_positions": KEPT}, tmp_path)
    (axes,) = drawn["kept.png"].axes
    (span,) = axes.patches
    corners = span.get_extents().transformed(axes.transData.inverted())
    assert (corners.x0, corners.x1) == (pytest.approx(1.5), pytest.approx(4.5))  # tokens 2, 3 and 4
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 0], [3, 0]], [[1, 1], [2, 1], [8, 1]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0, head 0", "layer 0, head 1"]
    assert axes.get_title() == "one" and axes.get_xlim() == (-1, 9)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first head is on top


def test_pictures_are_files(tmp_path: Path) -> None:
    report = {"rows": ROWS, "shares": {"0.15": [[0.1, 0.2]]}, "kept_positions": KEPT}
    paths = plots.draw(report, tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "budgets.png", "kept.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)
