"""The page: a template that is filled with data. Which rows are kept is a bit for each (head, token)."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkv.policies import Policy
from lkv.show.collect import Method, Shown, choose, collect

MARK = "null"  # the data of the template itself
SCRIPT = '<script id="data" type="application/json">'


def page(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    policies: Sequence[str] | Mapping[str, str | Policy],
    out: str | os.PathLike[str],
    *,
    retention: float = 0.15,
    questions: Sequence[str] = (),
    protect: int | None = None,
    limit: int = 64,
    title: str = "text",
    name: str | None = None,
) -> Shown:
    """Writes a page on which a text shows what one or two policies keep of it; see `collect` for the arguments.

    Raises:
        ValueError: as `collect`, and for more than two policies.
        OSError: where the page cannot be written.
    """
    check_count(len(choose(policies)))
    shown = collect(
        model,
        tokenizer,
        text,
        policies,
        retention=retention,
        questions=questions,
        protect=protect,
        limit=limit,
        title=title,
        name=name,
    )
    write(shown, out)
    return shown


def write(shown: Shown, out: str | os.PathLike[str]) -> Path:
    """The page of what was collected, whole or not at all.

    Raises:
        ValueError: for more than two methods.
        OSError: where the page cannot be written.
    """
    check_count(len(shown.methods))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(render(shown), encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return path


def check_count(methods: int) -> None:
    """
    Raises:
        ValueError: for more methods than lie side by side.
    """
    if methods > 2:
        raise ValueError(f"lkv.show: expected one or two policies on a page, got {methods}")


def render(shown: Shown) -> str:
    template = (files("lkv.show") / "page.html").read_text(encoding="utf-8")
    before, found, after = template.partition(SCRIPT + MARK)
    assert found, "the template has a place for the data"
    text = json.dumps(data(shown), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # nothing in it ends the script, whatever the text
        text = text.replace(character, f"\\u{ord(character):04x}")
    return before + SCRIPT + text + after


def data(shown: Shown) -> dict[str, object]:
    """What the script of the page reads."""
    return {
        **{name: getattr(shown, name) for name in ("title", "model", "dtype", "retention", "opening", "layers")},
        **{name: getattr(shown, name) for name in ("heads", "tokens", "rows", "nbytes", "questions", "answers")},
        "units": [text for text, _ in shown.units],
        "merged": {i: count for i, (_, count) in enumerate(shown.units) if count != 1},
        "methods": [
            {"name": x.name, "rows": x.kept, "nbytes": x.nbytes, "answers": x.answers, "kept": bits(x, shown.tokens)}
            for x in shown.methods
        ],
    }


def bits(method: Method, tokens: int) -> str:
    """Base64 of a bit for each token, the lowest of a byte first; every (layer, head) begins with a new byte."""
    heads = [head for layer in method.rows for head in layer]
    kept = np.zeros((len(heads), tokens), dtype=bool)
    for row, positions in zip(kept, heads, strict=True):
        row[positions.numpy()] = True
    return base64.b64encode(np.packbits(kept, axis=1, bitorder="little").tobytes()).decode()
