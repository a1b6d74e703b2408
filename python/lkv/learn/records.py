"""What a model has read, on disk: keys and values of every passage, made once and read over and over.

A folder holds a manifest, which says what the records were made with, and a safetensors file for each passage, which is
mapped into memory. A record is there as a whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Record:
    """One passage.

    Attributes:
        tokens: int32 `[n]`.
        keys, values: bfloat16 `[N, H, n, D]`, keys after RoPE.
        cos, sin: `[R, n, D']`, the different rotations of the keys; rotation: of each layer. Nothing where LKV-T reads
            hidden states.
        hidden: bfloat16 `[N, n, hidden]`, what the attention of each layer was called with, where LKV-T reads that.
        attention: float16 `[N, H, n]`, the logarithm of what questions and answers pay; see `lkv.learn.targets`.
        kvzip: as `attention`, of a repetition; None where there was none.
        questions, replies: tokens; last the continuation, if there is one: its
            first token asks for the others.
        continues: whether there is one.
    """

    tokens: Tensor
    keys: Tensor
    values: Tensor
    attention: Tensor
    questions: list[list[int]]
    replies: list[list[int]]
    continues: bool
    domain: str
    document: str
    rotation: list[int]
    cos: Tensor | None = None
    sin: Tensor | None = None
    hidden: Tensor | None = None
    kvzip: Tensor | None = None

    def write(self, path: Path) -> None:
        """
        Raises:
            OSError: where the disk is full, naming the folder and what was needed; nothing is left of the record.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x.contiguous() for name, x in values.items() if isinstance(x, Tensor)}
        rest = {name: x for name, x in values.items() if name not in tensors and x is not None}
        data = save(tensors, {"record": json.dumps(rest)})
        _replace(path, data)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Its tensors are mapped: what is not looked at is not read."""
        with safe_open(path, "pt") as file:
            rest = json.loads(file.metadata()["record"])
            return cls(**rest, **{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # no mapping


class Records:
    """The records of one split in a folder.

    Attributes:
        count: how many there shall be.
    """

    def __init__(self, folder: Path, split: str, count: int) -> None:
        self.folder, self.split, self.count = folder, split, count

    def path(self, index: int) -> Path:
        return self.folder / self.split / f"{index:06d}.safetensors"

    def missing(self) -> list[int]:
        return [i for i in range(self.count) if not self.path(i).exists()]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        return Record.read(self.path(index))


def claim(folder: Path, manifest: Mapping[str, object]) -> None:
    """Makes a folder the place for what is made with this manifest, or checks that it is; raises as `agreed`.

    Raises:
        OSError: where the disk is full.
    """
    if made_with(folder) != (whole := agreed(folder, manifest)):
        write_manifest(folder, whole)


def agreed(
    folder: Path,
    manifest: Mapping[str, object],
    *,
    grows: Sequence[str] = (),
    command: str = "lkv train",
    what: str = "records",
) -> dict[str, object]:
    """The manifest of a folder, where it agrees with this one, with what this one adds.

    Args:
        grows: names of mappings to which later runs may add entries. Those that are there have to stay the same.
        command, what: that the error names.

    Raises:
        ValueError: where the folder holds what was made with something else, naming what differs.
    """
    theirs: dict[str, Any] = made_with(folder)
    ours: dict[str, Any] = json.loads(json.dumps(manifest))
    if not theirs:
        return ours
    names = sorted((ours.keys() | theirs.keys()) - set(grows))
    other = [_differs(name, ours, theirs, name) for name in names if ours.get(name) != theirs.get(name)]
    for name in grows:
        there, now = theirs[name], ours[name]
        other += [_differs(f"{name} {key}", now, there, key) for key in now if there.get(key, now[key]) != now[key]]
        ours[name] = {**there, **now}
    if other:
        raise ValueError(
            f"{command}: expected the {what} in {folder} to be of this run, got others: {'; '.join(other)}; name "
            "another folder, or delete that one"
        )
    return ours


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """
    Raises:
        OSError: where the disk is full.
    """
    _replace(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _differs(label: str, ours: Mapping[str, object], theirs: Mapping[str, object], name: str) -> str:
    return f"{label} {_short(ours.get(name))}, which was {_short(theirs.get(name))}"


def made_with(folder: Path) -> dict[str, object]:
    """The manifest of a folder; empty where there is none yet."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}


def full(folder: Path, needed: int, error: OSError | None = None) -> OSError:
    """The error for a disk that has no place for so many bytes."""
    number, size = errno.ENOSPC if error is None else error.errno, max(needed >> 20, 1)
    return OSError(number, f"lkv train: expected {size} MB of free space for records in {folder}, got less")


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in FULL:
            raise full(path.parent, len(data), error) from error
        raise


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} letters)"
