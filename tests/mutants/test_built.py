"""The list of mutants of the C++ sources is one of the sources that are there. `make mutants` builds and tries them."""

from __future__ import annotations

from mutants.built import MUTATIONS, ROOT


def test_every_text_is_there() -> None:
    """A list that has fallen behind the sources says so at once, not only where all of it is tried."""
    assert len({x.name for x in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        text = (ROOT / "csrc" / mutation.file).read_text()
        assert mutation.apply(text) != text, mutation.name
