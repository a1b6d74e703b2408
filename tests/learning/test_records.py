"""Records on disk: as they were, whole or not at all, and only beside what they were made with."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from lkv.learn.records import MANIFEST, Record, Records, agreed, claim, made_with

RICH = dict(cos=torch.randn(1, 5, 4), sin=torch.randn(1, 5, 4), kvzip=torch.randn(2, 2, 5).half())


def some(size: int = 5, **more: object) -> Record:
    return Record(
        tokens=torch.arange(size, dtype=torch.int32),
        keys=torch.randn(2, 2, size, 4).bfloat16(),
        values=torch.randn(2, 2, size, 4).bfloat16(),
        attention=torch.randn(2, 2, size).half(),
        questions=[[1, 2], [3]],
        replies=[[4], [5, 6]],
        continues=True,
        domain="essays",
        document="größe.txt",
        rotation=[0, 0],
        **more,
    )


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails in the midst of it, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "more", [{}, RICH, dict(hidden=torch.randn(2, 5, 16).bfloat16())], ids=["bare", "kv", "hidden"]
)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, more: dict) -> None:
    record = some(**more)
    records = Records(tmp_path, "train", 3)
    record.write(records.path(1))
    assert records.missing() == [0, 2] and len(records) == 3
    again = records[1]
    for field in fields(Record):
        a, b = getattr(record, field.name), getattr(again, field.name)
        assert (torch.equal(a, b) and a.dtype == b.dtype) if isinstance(a, torch.Tensor) else a == b, field.name
    assert [x.name for x in (tmp_path / "train").iterdir()] == ["000001.safetensors"]


def test_a_token_takes_what_its_keys_and_values_do(tmp_path: Path) -> None:
    """Two bytes a number: 2 layers of 2 heads with keys and values of 4 are 64 bytes, and 8 of the target."""
    sizes = []
    for size in (1000, 3000):
        some(size).write(tmp_path / f"{size}")
        sizes.append((tmp_path / f"{size}").stat().st_size)
    assert (sizes[1] - sizes[0]) / 2000 == pytest.approx(64 + 8 + 4, abs=0.1)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "train" / "000000.safetensors"
    with (
        files_of_at_most(20_000),
        pytest.raises(OSError, match=r"lkv train: expected 1 MB of free space .*train, got less"),
    ):
        some(5000).write(path)
    assert list(path.parent.iterdir()) == []
    some(5).write(path)  # an older one stays
    with files_of_at_most(20_000), pytest.raises(OSError, match="free space"):
        some(5000).write(path)
    assert len(Record.read(path).tokens) == 5 and len(list(path.parent.iterdir())) == 1


def test_a_torn_file_is_no_record(tmp_path: Path) -> None:
    records = Records(tmp_path, "train", 1)
    records.path(0).parent.mkdir(parents=True)
    records.path(0).with_name("000000.safetensors.77.part").write_bytes(b"torn")
    assert records.missing() == [0]


def test_a_folder_belongs_to_one_manifest(tmp_path: Path) -> None:
    manifest = {"format": 1, "model": "abc", "documents": [["a", "b"]], "length": 900}
    assert made_with(tmp_path / "new") == {}
    claim(tmp_path / "new", manifest)
    claim(tmp_path / "new", dict(manifest))
    assert made_with(tmp_path / "new") == manifest == json.loads((tmp_path / "new" / MANIFEST).read_text())
    other = {**manifest, "model": "xyz", "length": 1000, "documents": [["a", "b"] * 40]}
    with pytest.raises(
        ValueError,
        match=r"^lkv train: expected the records in .*new to be of this run, got others: documents .*\(\d+ letters\), "
        r'which was \[\["a", "b"\]\]; length 1000, which was 900; model "xyz", which was "abc"; name another folder',
    ):
        claim(tmp_path / "new", other)
    with pytest.raises(ValueError, match="others: more null, which was 1;"):
        (tmp_path / "new" / MANIFEST).write_text(json.dumps({**manifest, "more": 1}))
        claim(tmp_path / "new", manifest)


def test_entries_that_may_be_added_are_and_those_that_are_there_stay(tmp_path: Path) -> None:
    claim(tmp_path, {"model": "abc", "methods": {"a": 1, "b": 2}})
    more = {"model": "abc", "methods": {"b": 2, "c": 3}}
    assert agreed(tmp_path, more, grows=("methods",)) == {"model": "abc", "methods": {"a": 1, "b": 2, "c": 3}}
    for methods, named in (
        ({"b": 3}, "methods b 3, which was 2"),
        ({"c": 3, "a": None}, "methods a null, which was 1"),
    ):
        with pytest.raises(ValueError, match=f"others: {named};"):
            agreed(tmp_path, {"model": "abc", "methods": methods}, grows=("methods",))
