"""Text files of domains: each is of one split, wherever it lies and whatever else is there."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
from tiny_texts import files

from lkv.tasks.documents import Document, documents


def write(folder: Path, count: int, prefix: str = "text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"{prefix} number {i}.")
    return folder


@pytest.mark.parametrize(
    ("count", "sizes"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (10, (7, 1, 2)), (40, (30, 4, 6))], ids=str
)
def test_files_are_split_as_a_whole(tmp_path: Path, count: int, sizes: tuple[int, int, int]) -> None:
    found = documents([write(tmp_path / "some", count)])
    assert len({x.digest for x in found}) == len({x.name for x in found}) == count
    splits = Counter(x.split for x in found)
    assert (splits["train"], splits["validation"], splits["test"]) == sizes


def test_splits_depend_on_the_texts_and_not_on_their_place(tmp_path: Path) -> None:
    def splits(found: list[Document]) -> dict[str, str]:
        return {x.text: x.split for x in found}

    here = documents([write(tmp_path / "a" / "some", 20)])
    there = write(tmp_path / "b" / "other" / "deep", 20)
    for i in range(20):
        (there / f"{i}.txt").rename(there / f"renamed {97 * i % 20}.txt")
    elsewhere = documents([f"some={tmp_path / 'b'}"])
    assert splits(here) == splits(elsewhere)
    assert {x.domain for x in here} == {x.domain for x in elsewhere} == {"some"}
    assert {x.name.split("/")[0] for x in elsewhere} == {"other"}
    order = sorted(x.digest for x in here)
    assert [x.digest for x in here] == order  # that of the list as well


def test_domains_are_folders_or_labels(tmp_path: Path) -> None:
    essays, sources = files(tmp_path, 4)
    assert Counter(x.domain for x in documents([essays, sources])) == {"essays": 4, "sources": 4}
    assert Counter(x.domain for x in documents([tmp_path])) == {tmp_path.name: 8}
    assert Counter(x.domain for x in documents([f"mine={tmp_path}"])) == {"mine": 8}
    assert Counter(x.domain for x in documents(sorted(essays.iterdir()))) == {"essays": 4}
    odd = write(tmp_path / "a=b", 3)
    assert {x.domain for x in documents([odd])} == {"a=b"}


def test_equal_texts_count_once_and_compressed_ones_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "some", 5)
    (folder / "twice.txt").write_text((folder / "1.txt").read_text())
    (folder / "packed.gz").write_bytes(gzip.compress(b"A text that is packed.\r\nIt has two lines."))
    found = documents([folder, folder / "1.txt"])
    assert len(found) == 6
    assert "A text that is packed.\nIt has two lines." in {x.text for x in found}


def test_a_folder_may_hold_more_than_texts(tmp_path: Path) -> None:
    folder = write(tmp_path / "some", 3)
    (folder / "empty.txt").write_text(" \n")
    for name, data in (("image.png", b"\x89PNG\xff\xfe"), ("zeros.bin", b"a\0b"), ("torn.gz", b"\x1f\x8bno gzip")):
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"expected a plain text file in UTF-8, got .*{name}"):
            documents([folder / name])
    assert len(documents([folder])) == 3


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a text file or a folder of such, got .*nothing"):
        documents([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="expected three files or more of the domain 'two'.* got 2"):
        documents([write(tmp_path / "two", 2)])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="expected plain text files in UTF-8 in .*none, found none"):
        documents([tmp_path / "none"])
