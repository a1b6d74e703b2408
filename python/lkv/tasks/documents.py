"""Plain text files as training and test texts: each belongs to a domain, and to one split as a whole."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHARES = {"validation": 0.1, "test": 0.15}  # of the files of a domain, at least one each; the others are for training


@dataclass(frozen=True)
class Document:
    """One file.

    Attributes:
        domain: what it is a text of: the label that was given, or the name of its folder.
        name: its path below the folder that was given.
        digest: of its text.
        split: "train", "validation" or "test".
    """

    domain: str
    name: str
    text: str
    digest: str
    split: str


def documents(sources: Sequence[str | Path]) -> list[Document]:
    """The files of all sources, in an order that does not depend on where they lie; equal texts once.

    Splits are by file: in the order of the files' digests, the first tenth of a domain is for validation, the next 15 %
    for tests. Files that are added or changed may move others to another split.

    Args:
        sources: files and folders; "label=path" gives the domain a name.

    Raises:
        FileNotFoundError: for a path that is not there.
        ValueError: for a file that is no text, a folder without texts, and a domain of fewer than three.
    """
    found: dict[str, dict[str, tuple[str, str]]] = {}
    known: set[str] = set()
    for source in sources:
        domain, path = _labelled(str(source))
        for file, name in _files(path):
            text = _text(file)
            if text is None:
                if path.is_file():
                    raise ValueError(f"lkv.tasks: expected a plain text file in UTF-8, got {path}")
                continue  # a folder may hold others as well
            digest = hashlib.sha256(text.encode()).hexdigest()
            if text.strip() and digest not in known:
                known.add(digest)
                found.setdefault(domain, {})[digest] = (name, text)
        if domain not in found:
            raise ValueError(f"lkv.tasks: expected plain text files in UTF-8 in {path}, found none that is new")
    out = []
    for domain, files in sorted(found.items()):
        if len(files) < 3:
            raise ValueError(
                f"lkv.tasks: expected three files or more of the domain {domain!r}, one at least for training, "
                f"validation and tests, got {len(files)}"
            )
        ends, splits = 0, []
        for split, share in SHARES.items():
            count = max(1, round(share * len(files)))
            splits += [split] * count
            ends += count
        splits += ["train"] * (len(files) - ends)
        for (digest, (name, text)), split in zip(sorted(files.items()), splits, strict=True):
            out.append(Document(domain, name, text, digest[:16], split))
    return out


def _labelled(source: str) -> tuple[str, Path]:
    label, equals, rest = source.partition("=")
    if equals and label and "/" not in label and not Path(source).exists():
        return label, _there(Path(rest))
    path = _there(Path(source))
    return (path if path.is_dir() else path.resolve().parent).resolve().name, path


def _there(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"lkv.tasks: expected a text file or a folder of such, got {path}, which is not there")
    return path


def _files(path: Path) -> list[tuple[Path, str]]:
    if path.is_file():
        return [(path, path.name)]
    files = [(file, str(file.relative_to(path))) for file in path.rglob("*") if file.is_file()]
    return sorted(files, key=lambda item: item[1])


def _text(file: Path) -> str | None:
    """What it holds, decompressed where its name ends in .gz; None where that is no text."""
    data = file.read_bytes()
    try:
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error):
        return None
    return None if "\0" in text else text.replace("\r\n", "\n")
