"""The demo on a small model: it ends well, and what it prints is so."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from lkv import demo


def test_demo_prints_what_it_kept(capsys):
    assert demo.main(["--device", "cpu", "--tokens", "600", "--layers", "2", "--retention", "0.25"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if re.match(r"\s+(\d+|all)  ", line)]
    per_layer = [int(row[2].replace(",", "")) for row in rows[:-1]]
    before, after = (int(cell.replace(",", "")) for cell in rows[-1][1:3])
    assert len(per_layer) == 2 and sum(per_layer) == after == round(0.25 * before)
    difference = float(re.search(r"differ by (\S+)", printed)[1])
    assert difference <= demo.TOLERANCE


def test_demo_says_when_the_logits_differ(capsys, monkeypatch):
    monkeypatch.setattr(demo, "TOLERANCE", -1.0)
    assert demo.main(["--device", "cpu", "--tokens", "100", "--layers", "1"]) == 1
    assert "expected logits that differ by at most" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--tokens", "3"], ["--layers", "0"], ["--retention", "2"]])
def test_demo_refuses(options, capsys):
    with pytest.raises(SystemExit):
        demo.main(options)
    assert "expected" in capsys.readouterr().err
