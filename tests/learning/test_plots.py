"""What the pictures show: the values, where they are drawn, and which line is which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lkv.evaluate import plots
from lkv.evaluate.lines import KNOWN as ORDER
from lkv.evaluate.lines import styles

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


MANY = [*ORDER, *(f"variant-{i}" for i in range(30))]


@pytest.mark.parametrize("count", [1, 12, 18, 40])
def test_no_two_methods_look_alike(count: int) -> None:
    """Neither in colour nor without it, and as ever, whatever else is drawn."""
    names = MANY[:count]
    looks = styles(["full", *names])
    assert list(looks) == names
    for traits in (("color",), ("marker", "ls")):
        assert len({tuple(str(look[x]) for x in traits) for look in looks.values()}) == count
    assert all(look["color"] != to_hex("0.5") for look in looks.values())  # that of the full cache
    few = styles(names[:3][::-1])
    assert count > 18 or all(few[name] == looks[name] for name in few)


def text_rows() -> list[dict]:
    rows = []
    for method in ("full", "lkv", "kvzip"):
        for retention in (1.0,) if method == "full" else (0.3, 0.1):
            kl = 0.0 if method == "full" else 0.02 / retention
            facts = {"exact": [0.5, 0.4, 0.6], "kl": [kl, kl / 2, 2 * kl], "tokens": [0.9, 0.8, 1.0]}
            row = {"method": method, "retention": retention, "facts": facts}
            row["continuation"] = {"kl": [2 * kl, kl, 3 * kl], "top1": [0.8, 0.7, 0.9]}
            rows += [{"domain": domain, **row} for domain in ("all", "essays")]
    return rows


def test_fidelity_over_kept_rows(drawn: dict[str, Figure], tmp_path: Path) -> None:
    report = {"rows": text_rows(), "shares": {}}
    assert plots.draw_texts(report, tmp_path, "lkv") == [tmp_path / "fidelity.png"]
    kl, exact, later, same = drawn["fidelity.png"].axes
    assert [axes.get_yscale() for axes in (kl, exact, later, same)] == ["log", "linear"] * 2
    lines = {line.get_label(): line for line in kl.lines}
    assert list(lines) == ["lkv", "kvzip"]  # nothing of the full cache, and of all domains once
    assert np.allclose(lines["lkv"].get_xydata(), [[10, 0.2], [30, 0.02 / 0.3]])
    assert [line.get_label() for line in exact.lines] == ["full", "lkv", "kvzip"]
    assert np.allclose(exact.lines[2].get_xydata(), [[10, 0.5], [30, 0.5]])
    band = kl.collections[0].get_paths()[0].vertices
    assert {tuple(np.round(point, 6)) for point in band} >= {(10, 0.1), (10, 0.4)}
    (legend,) = drawn["fidelity.png"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["full", "lkv", "kvzip"]


def test_fidelity_of_one_part(drawn: dict[str, Figure], tmp_path: Path) -> None:
    for row in (rows := text_rows()):
        row.pop("continuation")
    plots.draw_texts({"rows": rows, "shares": {}}, tmp_path, "lkv")
    assert len(drawn["fidelity.png"].axes) == 2


def test_unequal_budgets_side_by_side(drawn: dict[str, Figure], tmp_path: Path) -> None:
    """At the retention next to the wanted one, the reference first, with one range of colours."""
    shares = {
        "kvzip": {"0.05": [[0.1, 0.0]], "0.2": [[0.4, 0.0]]},
        "lkv": {"0.05": [[0.05, 0.05]], "0.2": [[0.1, 0.3]]},
        "snapkv": {"0.2": [[0.2, 0.2]]},
    }
    report = {"rows": text_rows(), "shares": shares}
    assert [path.name for path in plots.draw_texts(report, tmp_path, "lkv")] == ["fidelity.png", "budgets.png"]
    first, second, _ = drawn["budgets.png"].axes
    assert (first.get_title(), second.get_title()) == ("lkv, 20 %", "kvzip, 20 %")
    assert np.allclose(first.images[0].get_array(), [[10, 30]])
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 40)


def test_pictures_are_files(tmp_path: Path) -> None:
    report = {"rows": ROWS, "shares": {"0.15": [[0.1, 0.2]]}, "kept_positions": KEPT}
    paths = plots.draw(report, tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "budgets.png", "kept.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)
