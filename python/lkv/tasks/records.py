"""Records of benchmark files: lines of JSON, or a data set by name, and the fields that have to be in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lkv.extras import need


@dataclass(frozen=True)
class Record:
    """One record and where it stands, for messages.

    Attributes:
        place: "file.jsonl line 3", or the data set and the number of the row.
    """

    fields: Mapping[str, object]
    place: str

    def text(self, name: str, default: str | None = None) -> str:
        """
        Raises:
            ValueError: where the field is not there and has no default, or is no string.
        """
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def texts(self, name: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """
        Raises:
            ValueError: where the field is not there and has no default, or is no list of strings, or an empty one.
        """
        value = self.fields.get(name)
        if value in (None, []) and default is not None:
            return default
        if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
            raise self.error(name, "a list of one or more strings")
        return tuple(value)

    def error(self, name: str, kind: str) -> ValueError:
        if name in self.fields:
            got = repr(self.fields[name])
            got = got if len(got) <= 60 else got[:57] + "..."
        else:
            got = "a record with " + (", ".join(map(repr, self.fields)) or "no fields")
        return ValueError(f"lkv.tasks: {self.place}: expected the field {name!r}, {kind}, got {got}")


def read(source: str | Path, split: str) -> Iterator[Record]:
    """
    Args:
        source: a file of JSON lines, or the name of a data set that the `datasets` library loads, with the name of its
            configuration after a colon ("owner/name:configuration").
        split: of a data set.

    Raises:
        ValueError: for a file without records, a line that is not a JSON object, and a data set that does not load.
        FileNotFoundError: for a file that is not there. MissingPackage: for a data set, without `datasets`.
    """
    path = Path(source)
    if path.exists() or path.suffix in (".jsonl", ".json") or path.is_absolute():
        return _file(path)
    return _dataset(str(source), split)


def _file(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise FileNotFoundError(f"lkv.tasks: expected a file of JSON lines, got {path}, which is none")
    found = False
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                got = f"{line.strip()[:40]!r} ({error.msg}, column {error.colno})"
                raise ValueError(f"lkv.tasks: {place}: expected a JSON object, got {got}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"lkv.tasks: {place}: expected a JSON object, got {line.strip()[:40]!r}")
            found = True
            yield Record(fields, place)
    if not found:
        raise ValueError(f"lkv.tasks: {path}: expected at least one record, got an empty file")


def _dataset(source: str, split: str) -> Iterator[Record]:
    datasets = need("datasets", "longbench", f"the data set {source!r}, as there is no such file")
    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"lkv.tasks: expected a data set that loads, got {source!r}, split {split!r}: {error}"
        ) from error
    if not len(rows):
        raise ValueError(f"lkv.tasks: {source}: expected at least one record, got an empty split {split!r}")
    for number, row in enumerate(rows):
        yield Record(row, f"{source} row {number}")
